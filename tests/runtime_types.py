"""The type checker that runs on the package's signatures while tests run: beartype, with int accepted for float (PEP 484)."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))

"""Do two models mean the same tokens by the same ids? The check is on tokenizers, never on `vocab_size`.

Checkpoints of one family share a tokenizer but pad their embedding matrices differently (Qwen2.5: 151,936 and 152,064 rows
for 151,665 tokens): equal size does not prove equal vocabulary, and unequal size does not disprove it.
"""

from typing import Any

from prune_opd_hf.errors import VocabularyMismatchError


def shared_vocabulary_size(student_tokenizer: Any, teacher_tokenizer: Any) -> int:
    """Number of ids, counted from 0, that mean the same token in both tokenizers.

    One tokenizer may know further tokens beyond the shared ones; rows of either model beyond this size must enter neither a
    top-k nor a normalisation.

    Raises:
        VocabularyMismatchError: an id below the size of both means different tokens; names the first one.

    Example:
        >>> class Words:
        ...     def __init__(self, *words): self.words = words
        ...     def get_vocab(self): return {word: index for index, word in enumerate(self.words)}
        >>> shared_vocabulary_size(Words("a", "b"), Words("a", "b", "<extra>"))
        2
        >>> try:
        ...     shared_vocabulary_size(Words("a", "b"), Words("a", "c"))
        ... except VocabularyMismatchError as error:
        ...     print(str(error).split(": ")[1])
        token id 1 is 'b' for the student and 'c' for the teacher. Choose two models of one family.
    """
    student = {index: token for token, index in student_tokenizer.get_vocab().items()}
    teacher = {index: token for token, index in teacher_tokenizer.get_vocab().items()}
    size = min(max(student, default=-1), max(teacher, default=-1)) + 1
    for index in range(size):
        if student.get(index) != teacher.get(index):
            raise VocabularyMismatchError(
                f"student and teacher have different tokenizers: token id {index} is {student.get(index)!r} for the "
                f"student and {teacher.get(index)!r} for the teacher. Choose two models of one family."
            )
    return size

"""What a prompt is: text, conversations and parts become the token ids that the model was trained on, or one line says why not.

Public reports of these kinds: a second BOS before templated text (OpenRLHF 393, open-r1 462, mlx-examples 1095), a second header
behind the assistant's message (transformers 33198), content in parts (VLM-R1 110, FastChat 3017), a refused system turn
(lm-evaluation-harness 2109, LlamaFactory 8217).
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TEMPLATE, byte_tokenizer

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.models.prompts import PromptEncoder, messages_of

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "It is"}]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def encode(prompt, tokenizer=None, **settings):
    return PromptEncoder(byte_tokenizer() if tokenizer is None else tokenizer, **settings)(prompt)


def ids_of(text):
    """The ids of special tokens and bytes as they stand."""
    return byte_tokenizer(front=())(text)["input_ids"]


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize("front", [(), ("<s>",), ("<s>", "<|system|>")], ids=["nothing", "one", "two"])
@pytest.mark.parametrize("behind", [(), ("</s>",)], ids=["open", "closed"])
@settings(max_examples=30)
@given(text=TEXTS)
def test_a_text_gets_what_its_tokenizer_puts_in_front_once_and_no_end(front, behind, text):
    tokenizer, expected = byte_tokenizer(front=front, behind=behind), ids_of("".join(front) + text)
    assert encode(text, tokenizer) == expected
    assert encode("".join(front) + text, tokenizer) == expected  # templated already


@pytest.mark.parametrize("behind", [(), ("</s>",)])
def test_an_end_in_the_text_itself_stays(behind):
    assert encode("a</s>", byte_tokenizer(behind=behind)) == ids_of("<s>a</s>")


def test_a_templated_text_is_the_same_prompt_as_its_conversation():
    tokenizer = byte_tokenizer()
    text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<s>")
    assert tokenizer(text)["input_ids"][:2] == [0, 0]  # what a second front looks like
    assert encode(text, tokenizer) == encode(ASKED, tokenizer) == ids_of(text)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), byte_tokenizer(front=())])
def test_an_empty_text_is_refused(tokenizer):
    with pytest.raises(InputError, match="this prompt has no tokens: ''"):
        encode("", tokenizer)


def test_half_a_surrogate_pair_is_refused_in_one_line():
    with pytest.raises(InputError, match="does not take the text"):
        encode("a\ud800")


# ---------------------------------------------------------------------- conversations


@settings(max_examples=30)
@given(TEXTS.filter(str.strip))
def test_a_conversation_is_rendered_up_to_the_assistants_header(text):
    expected = ids_of("<s><|user|>") + ids_of(text) + ids_of("<|end|><|assistant|>")
    assert encode([{"role": "user", "content": text}]) == expected


def test_an_answer_at_the_end_of_a_prompt_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"the last message is the assistant's.*final_assistant_message to 'drop'"):
        encode(ANSWERED)


def test_an_answer_at_the_end_is_dropped_where_that_is_wanted():
    several = [*ANSWERED, {"role": "assistant", "content": "2."}]
    assert encode(ANSWERED, final_assistant_message="drop") == encode(ASKED)
    assert encode(several, final_assistant_message="drop") == encode(ASKED)
    with pytest.raises(InputError, match="every message is the assistant's"):
        encode(ANSWERED[-1:], final_assistant_message="drop")


def test_the_student_goes_on_with_a_prefilled_answer():
    expected = ids_of("<s><|system|>Be brief.<|end|><|user|>1+1?<|end|><|assistant|>It is")
    assert encode(ANSWERED, final_assistant_message="prefill") == expected
    assert encode(ASKED, final_assistant_message="prefill") == encode(ASKED)  # nothing to go on with


def test_an_unknown_treatment_of_answers_is_refused():
    with pytest.raises(ConfigError, match="must be one of refuse, drop, prefill, got 'keep'"):
        PromptEncoder(byte_tokenizer(), final_assistant_message="keep")


PARTS = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?", "image": None}]}]
STRINGS_ONLY = TEMPLATE.replace("{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% endif %}")
PARTS_ONLY = TEMPLATE.replace(
    "{{ m.content }}", "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, STRINGS_ONLY, PARTS_ONLY], ids=["any", "strings", "parts"])
@pytest.mark.parametrize("prompt", [PARTS, [{"role": "user", "content": "1+1?"}]], ids=["parts", "string"])
def test_text_parts_are_one_text_whatever_form_the_template_reads(template, prompt):
    assert encode(prompt, byte_tokenizer(template=template)) == ids_of("<s><|user|>1+1?<|end|><|assistant|>")


def test_a_template_that_drops_what_the_user_says_is_refused():
    with pytest.raises(InputError, match="leaves out the text of the last message"):
        encode(ASKED, byte_tokenizer(template="{% for m in messages %}{{ m.text }}{% endfor %}"))


def test_a_template_may_trim_what_the_user_says():
    template = TEMPLATE.replace("m.content }}", "m.content | trim }}")
    prompt = [{"role": "user", "content": "  1+1?\n"}]
    assert encode(prompt, byte_tokenizer(template=template)) == ids_of("<s><|user|>1+1?<|end|><|assistant|>")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "a prompt must be text or a list of messages with 'role' and 'content', got int"),
        (None, "got NoneType"),
        (["text"], "got a list with 'text'"),
        ([{"from": "human", "value": "a"}], "got a list with {'from': 'human'"),
        ([{"role": 3, "content": "a"}], "got a list with {'role': 3"),
        ([], "the conversation is empty"),
        ([{"role": "user"}], r"message 0 \(user\) has no content"),
        ([*ASKED, {"role": "user", "content": None}], r"message 2 \(user\) has no content"),
        ([{"role": "user", "content": 3}], "the content of message 0 must be text or a list of parts, got int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 holds a part of type 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0 holds a part of type 'text'"),
        ([{"role": "user", "content": [3]}], "message 0 holds a part of type 'int'"),
    ],
)
def test_what_is_no_conversation_of_text_is_named(prompt, message):
    with pytest.raises(InputError, match=f"^this prompt: .*{message}") as refusal:
        encode(prompt)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_message_that_calls_tools_needs_no_content():
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    assert messages_of([{"role": "assistant", "content": None, "tool_calls": calls}]) == [
        {"role": "assistant", "tool_calls": calls}
    ]


@pytest.mark.parametrize("template", [None, ""])
def test_a_conversation_for_a_tokenizer_without_a_template_is_refused_with_the_remedy(template):
    with pytest.raises(InputError, match=r"the student's tokenizer has no chat template: set tokenizer\.chat_template"):
        encode(ASKED, byte_tokenizer(template=template))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[9].content.x }}", "no element 9"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if", "expected token"),
    ],
)
def test_a_template_that_refuses_a_conversation_is_one_line_with_its_reason(fault, said):
    with pytest.raises(InputError, match=rf"does not take this conversation \(system, user\): .*{said}") as refusal:
        encode(ASKED, byte_tokenizer(template=fault + TEMPLATE))
    assert len(str(refusal.value).splitlines()) == 1


def test_settings_reach_the_template():
    tokenizer = byte_tokenizer(template=TEMPLATE + "{% if not think %}None.{% endif %}")
    text = "<s><|user|>1+1?<|end|><|assistant|>"
    assert encode(ASKED[1:], tokenizer, chat_template_kwargs={"think": True}) == ids_of(text)
    assert encode(ASKED[1:], tokenizer) == ids_of(text + "None.")

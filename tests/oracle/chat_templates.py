"""Chat templates in the form of the published ones: who writes the start token, where the pictures
stand, what a turn ends with. Each can write what the assistant says, too, which shows whether a blank
stands before an answer."""

from __future__ import annotations

_PICTURES = (
    "{%% for part in message['content'] %%}{%% if part['type'] == 'image' %%}{{ '%s' }}{%% endif %%}"
    "{%% endfor %%}"
)
_WORDS = (
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}"
)

LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    + _PICTURES % r"<image>\n"
    + _WORDS
    + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VICUNA = (
    "{{ 'A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human. ' }}" + LLAVA
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + _PICTURES % r"<image>\n"
    + _WORDS
    + "{{ ' [/INST]' }}{% else %}{{ ' ' }}"
    + _WORDS
    + "{{ '</s> ' }}{% endif %}{% endfor %}"
)
GRANITE = (
    "{{ '<|system|>\\nA chat between a curious user and an artificial intelligence assistant.\\n' }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    + _PICTURES % "<image>"
    + _WORDS
    + "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part['text'] | trim }}"
    "{% endif %}{% endfor %}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<|image|>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_SPOKEN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IDEFICS3 = "<|begin_of_text|>" + _SPOKEN
SMOLVLM = "<|im_start|>" + _SPOKEN


def chatml(picture: str, system: str = "") -> str:
    """Qwen's form of turns, with a system sentence where the checkpoint has one."""
    opening = f"{{{{ '<|im_start|>system\\n{system}<|im_end|>\\n' }}}}" if system else ""
    return (
        opening
        + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        + "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + f"{{{{ '{picture}' }}}}"
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


QWEN_VL = chatml("<|vision_start|><|image_pad|><|vision_end|>", "You are a helpful assistant.")
QWEN3_VL = chatml("<|vision_start|><|image_pad|><|vision_end|>")
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    + _PICTURES % "<image>"
    + "{{ '\\n' }}"
    + _WORDS
    + "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INTERNVL = chatml("<IMG_CONTEXT>\\n")

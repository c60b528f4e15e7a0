"""Make the demo's tokenizer: a byte-level BPE of a few hundred words that still encodes any text.

It learns its merges from captions of training scenes wrapped in the prompt template, has Qwen3's three
special tokens, and starts from all 256 bytes, so that there is no unknown token. The files written are what
transformers' AutoTokenizer loads.

    python -m training.tokenizer --output work/text_encoder
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.captions import write_caption
from training.scenes import sample_scene

TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"  # Qwen3's, rendered, thinking enabled
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 768  # 256 bytes, 3 special tokens, and room for every word of the captions

_CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def build_tokenizer(*, captions: int = 40_000, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the merges on that many captions and wrap the result for transformers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(captions, seed), trainer)
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=end_of_text,
        eos_token=end_of_turn,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


def _corpus(captions: int, seed: int) -> Iterator[str]:
    rng = np.random.default_rng((seed, 1))
    for _ in range(captions):
        scene = sample_scene(rng, held_out=False)
        yield "user\n" + write_caption(scene, rng).text + "\nassistant\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("work/text_encoder"))
    parser.add_argument("--captions", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = build_tokenizer(captions=arguments.captions, seed=arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(arguments.output)
    print(f"{len(tokenizer)} tokens written to {arguments.output}")


if __name__ == "__main__":
    main()

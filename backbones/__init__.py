"""The real backbones: diffusion language models with published weights.

    from backbones.checkpoint import load_backbone
    backbone = load_backbone("inclusionAI/LLaDA-MoE-7B-A1B-Base", load_4bit=True)

Each is an ordinary transformer that looks both ways:

    LLaDA-8B    LLaMA without the causal mask
    LLaDA-MoE   Qwen3-MoE without the causal mask: 64 experts, 8 for each token
    LLaDA2.x    GLM-4-MoE with a block-causal mask: 256 experts in 8 groups, one shared expert
    A2D         Llama, Qwen2 or Qwen3 that was trained on without the causal mask: from 0.1 billion
                weights on, for a laptop or a small GPU
    SDAR        Qwen3 with a block-causal mask, in blocks of 4
    Dream       Qwen2.5; the logits of a token come from the hidden state before it

A model is its config.json, its safetensors and its tokenizer. No code from a model's repository
is run, and nothing is unpickled.

In LLaDA-8B and LLaDA-MoE a token sees the whole text. LLaDA2.x decodes one block of 32 tokens
after the other: a token sees its own block and the blocks before it. Still, LLaDA2.x is trained
with memory and adapted to prompts under full attention, because the published run did so
(--attention full, the default). --attention block is the mask that its base model was trained with.
The same holds for SDAR. A model that was trained left to right can look left only, in all layers
(--attention causal), in the N lower ones (--attention causal:N), or in the prompt (--attention
causal-prompt).

`--model smollm2` is a real model that comes inside a Python package: see smollm2.py.

The rooms, from the ground up:

    experts          the experts of a layer
    blocks           the parts of a transformer, and the blocks side by side
    block_diffusion  the decoder of LLaDA2.x and SDAR
    block_cache      faster decoding of the others: keys and values outside a block are kept
    config           config.json -> Config
    families         one row per family: everything that is special about it
    lora             the LoRA that the outer loop trains, through PEFT
    backbone         a network with the interface that memdlm.py asks for
    text             tokenizer, chat template, chat data
    smollm2          the model that comes inside a package
    convert          from left to right to diffusion: sight, mask, shifted logits
    checkpoint       from a hub id or a folder to a backbone, also in 4 bits
    plan             the memory of a training run and of an answer, before anything is loaded
    tiny             a tiny random checkpoint of any family, to try the whole path on a CPU

To add a model, write its block (if its mathematics is new), its row in families.py, and its row in
the tests.
"""

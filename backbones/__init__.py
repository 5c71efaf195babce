"""The real backbones: LLaDA-8B, LLaDA-MoE and LLaDA2.x."""

"""The paper's side of the project: its claims, its tasks and its tables.

    runs.py       which models are trained for the claims, and the work through all of them
    measures.py   what is measured on each trained model
    claims.py     each claim as a difference between two runs, and the verdict of the statistics
    report.py     the verdicts as tables, pictures and one page
    variants.py   ways to train that no setting names, which take memory apart
    lora_rows.py  why a LoRA gains from memory in training: the experiments that decide it
    baselines.py  other remedies for exposure bias, at the same compute
    ladder.py     rows of pretrained bases beside the toy's, and what only 7B can show
    conversion.py six ways from a model that was trained left to right to a diffusion model
    pretrained.py the paper's claims on that model
    harness.py    lm-evaluation-harness, whose tasks a model answers with the decoder of generate.py
    pictures.py   all pictures once more from their stored numbers
    scores.py     scores.json: each score under the name of what was measured
    tables.py     the paper's tables, with our scores beside its numbers

The first four belong together: `python evaluate.py claims` runs them in this order, on the toy. The
next three are studies of their own: `python evaluate.py lora` and `python evaluate.py baselines`.
The others are for real models: `python evaluate.py conversion`, `pretrained`, `tasks` and `paper`.
"""

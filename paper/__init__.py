"""The paper's side of the project: its claims, its tasks and its tables.

    runs.py       which models are trained for the claims, and the work through all of them
    measures.py   what is measured on each trained model
    claims.py     each claim as a difference between two runs, and the verdict of the statistics
    report.py     the verdicts as tables, pictures and one page
    conversion.py six ways from a model that was trained left to right to a diffusion model
    pretrained.py the paper's claims on that model
    harness.py    lm-evaluation-harness, whose tasks a model answers with the decoder of generate.py
    pictures.py   all pictures once more from their stored numbers
    scores.py     scores.json: each score under the name of what was measured
    tables.py     the paper's tables, with our scores beside its numbers

The first four belong together: `python evaluate.py claims` runs them in this order, on the toy. The
others are for real models: `python evaluate.py conversion`, `pretrained`, `tasks` and `paper`.
"""

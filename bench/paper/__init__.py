"""The experiments of the papers as commands: `python -m bench.paper mslr|safe-rlhf|clp-summary PATH --out DIR`.

Each trains and measures with the library's own doors (`mopl.ranking.rank`, `mopl.alignment.align`,
`mopl.clp.train_policies`); nothing here trains.

    __main__.py     the command
    mslr.py         COS-DPO on MSLR: which runs, and what is said of them
    safe_rlhf.py    COS-DPO on PKU-SafeRLHF
    clp_summary.py  CLP on XSum
    plan.py         runs of an experiment; which folder holds what, so that the same command goes on
    estimate.py     how long it will take, measured on a few steps
    tables.py       our figures under those of the paper
    pictures.py     fronts, and rewards over the KL
    rows.py         records of JSON lines and parquet, and whether they have their fields
    samples.py      generated data in the public formats, to try the commands on
    figures.json    figures of the papers, each with its place there; what is not in it, no table shows
"""

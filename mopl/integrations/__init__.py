"""mopl inside other people's trainers: `mopl.integrations.transformers` and `mopl.integrations.trl`.

Each is imported only when it is asked for, with the library that it is for.
"""

"""The commands of `mopl`: a parser and a few lines for each. Nothing heavy is imported until one of them acts."""

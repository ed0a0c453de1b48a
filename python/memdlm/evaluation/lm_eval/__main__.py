"""The harness's command line; importing this package has given it the model "memdlm"."""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()

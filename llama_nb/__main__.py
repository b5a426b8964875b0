"""`python -m llama_nb` is the command `llama-nb`."""
from llama_nb.cli import main

if __name__ == '__main__':
    main()

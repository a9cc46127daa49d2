"""`python -m hf_querydet` is the command `hf-querydet`, for `accelerate launch -m hf_querydet`."""

from hf_querydet.cli import main

if __name__ == "__main__":
    main()

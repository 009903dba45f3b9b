"""`python -m upcycle`, for launchers such as `accelerate launch -m upcycle`."""

from upcycle.cli import main

if __name__ == "__main__":
    main()

"""``python -m moe_routing`` is ``moe-routing``."""

from moe_routing.cli import main

if __name__ == "__main__":
    main()

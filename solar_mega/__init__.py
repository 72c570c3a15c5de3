"""solar_mega: grow a large language model by depth and train it to the end (SOLAR 10.7B, arXiv
2312.15166)."""

__version__ = "0.1.0"

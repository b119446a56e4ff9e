"""Build a real base/fine-tune pair:  python examples/real_pairs.py smollm2-mixed"""
from pairs.pair import cache_root
from pairs.smollm2 import build_mixed
print(build_mixed(cache_root()))

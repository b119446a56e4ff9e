"""Files of a delta repo without a model: tensor names, headers, sizes, and paths not to trust.

`headers.read_headers` reads and checks safetensors files, `headers.check_base` compares
fingerprints, `sizes.size_report` counts bytes by kind, and `untrusted_paths` finds a repo's files
and refuses names that lead out of it. Nothing here runs code or takes memory by what a file claims.
"""

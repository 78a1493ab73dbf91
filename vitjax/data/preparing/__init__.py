"""`vitjax data prepare`: from a source of any kind to shards, an index and a card.

`prepare` plans and finishes; `shard` is what a process does; `encoding` decodes and encodes one
image; `merge` finds what several shards have in common; `card` is what the folder says of itself.
"""

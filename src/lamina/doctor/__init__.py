"""The doctor: what is wrong with a job, why it matters and how to mend it, before anything is trained.

A rule is a small function from one gathered value, the ``Case``, to the findings it has. The case holds the job, the base's
config, the tokenizer and the statistics of the data, which were counted while the data were read; no rule reads a file, and no
weights are loaded. ``rules.RULES`` lists them all. What the rest of Lamina refuses with an error (a target that matches nothing,
rows that cannot be read) is a finding here, and the examination goes on with what is left.

Rejected: a registry that rules enter by a decorator, because a list can be read; severities that a user sets, because then
the same job would be healthy on one machine and not on another; judging by the weights, which takes minutes for what their
width tells well enough.
"""

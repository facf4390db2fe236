"""Evidence: what pruning does to a pair, a run and a rollout, and whether it is worth it.

replay.py             other drift settings on stored rollouts, without a new generation
preflight/            do a teacher and a student fit, and with which settings? before any training
study/                training with and without pruning and with other cuts, over several seeds
diagnostics/          does agreement say where the signal is? on stored rollouts
viewer/               stored rollouts as one HTML file
figures.py            every figure, each with its numbers as CSV
learning_curve.py     training under a budget with evaluations along the way
worker_processes.py   runs in processes of their own
"""

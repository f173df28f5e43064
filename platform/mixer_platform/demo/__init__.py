"""The demo: the product's whole job on one machine, each stage a job of its own on a real Ray cluster."""

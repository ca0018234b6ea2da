"""Holds the compiled extension modules and the records of their builds; see adamops.op_builder."""

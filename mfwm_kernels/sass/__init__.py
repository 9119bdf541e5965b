"""Reads GPU machine code (SASS) and counts what a launch executes, without a GPU.

listing       cuobjdump's text as instructions and operands
state         a thread's integers and predicates
semantics     what each instruction does to them
interpreter   runs one warp of a launch: which instructions it executes, how often, and what it waits for
measure       counts of a launch from the runs of some of its warps
occupancy     how many blocks an SM of an H100 or H200 holds
"""

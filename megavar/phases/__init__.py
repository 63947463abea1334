"""The phases that a round is made of. Each reads finished phases, writes its own directory, and resumes in it.

Every rank calls every phase; within one, ranks share the work by parts of questions.
"""

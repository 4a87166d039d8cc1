"""Is an answer right? Graders, the reading of answers, and the processes that grade and may be killed."""

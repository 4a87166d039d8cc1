"""Is an answer right? Graders, forms of answers, and the processes that grade and may be killed."""

//! What cannot work: each is refused with a sentence that names the cause, and nothing is left behind.

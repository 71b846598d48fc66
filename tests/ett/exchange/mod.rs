//! Weights of other programs.

mod llm;

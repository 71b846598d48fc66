//! Published weights in and out.

mod llm;
mod start;
mod table;
mod tokenizer;

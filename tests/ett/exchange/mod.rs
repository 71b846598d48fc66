//! Published weights in and out.

mod tokenizer;

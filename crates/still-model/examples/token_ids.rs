//! Prints the token ids of texts, for `scripts/check_tokenizers.py`: `token_ids MODEL plain|special`, one JSON text a line.

use std::io::BufRead;
use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use still_model::Tokenizer;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(around)) = (arguments.next(), arguments.next()) else {
        return Err("usage: token_ids MODEL plain|special".into());
    };
    let path = Path::new(&model);
    let tokenizer = if path.is_dir() {
        Tokenizer::from_hf_dir(path)?
    } else {
        let mut file = std::io::BufReader::new(std::fs::File::open(path)?);
        Tokenizer::from_gguf(path, &Content::read(&mut file)?)?
    };
    for line in std::io::stdin().lock().lines() {
        let text: String = serde_json::from_str(&line?)?;
        println!("{:?}", tokenizer.encode(&text, around == "special")?);
    }
    Ok(())
}

//! The forms that matrices take in memory, on the CPU.

use candle_core::{DType, Device, Tensor};
use still_attention::RowDtype;
use still_model::random::{random_model, tiny_config};
use still_model::{Model, ModelConfig, Weight, WeightFormat};
use still_testing::assert_relative_rms;

/// Of which the rows of some matrices are no whole blocks.
fn model() -> Model {
    random_model(ModelConfig { intermediate_size: 48, ..tiny_config() }, 3).unwrap()
}

fn placed(model: &Model, format: WeightFormat) -> Model {
    model.to_device_in(&Device::Cpu, DType::F32, format).unwrap()
}

fn logits(model: &Model) -> Vec<f32> {
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let hidden = model.prefill(&[1, 2, 3, 4, 5], &mut cache).unwrap();
    let mut all: Vec<f32> =
        model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    all.extend_from_slice(model.decode(&[6], &mut cache).unwrap());
    all
}

#[test]
fn matrices_are_quantized_and_dequantized() {
    let model = model();
    let expected = logits(&model);
    let quantized = placed(&model, WeightFormat::Q8_0);
    let (bytes, formats) = quantized.decoder.formats();
    // Two layers, each with one matrix of 48 columns.
    assert_eq!(formats.into_iter().collect::<Vec<_>>(), [("f32", 2), ("q8_0", 13)]);
    assert!(bytes < model.decoder.formats().0 / 2);
    assert_relative_rms("quantized", &logits(&quantized), &expected, 0.02);

    // What is quantized stays as it is, until it is asked to be something else.
    let again = placed(&quantized, WeightFormat::File);
    assert_eq!(again.decoder.formats(), quantized.decoder.formats());
    assert_eq!(logits(&again), logits(&quantized));
    let twice = placed(&quantized, WeightFormat::Q8_0);
    assert_eq!(logits(&twice), logits(&quantized));
    let dense = placed(&quantized, WeightFormat::Dense);
    assert_eq!(dense.decoder.formats().1.into_keys().collect::<Vec<_>>(), ["f32"]);
    assert_relative_rms("dequantized", &logits(&dense), &logits(&quantized), 1e-5);
}

#[test]
fn a_form_without_products_is_refused() {
    let refused = model().to_device_in(&Device::Cpu, DType::F32, WeightFormat::Fp8);
    let error = refused.unwrap_err();
    assert!(error.to_string().contains("fp8 on the CPU"), "{error}");
    assert!(error.hint().unwrap().contains("q8_0"));
}

#[test]
fn a_row_of_a_matrix_is_the_one_that_was_quantized() {
    let quantized = placed(&model(), WeightFormat::Q8_0);
    let embedding = &quantized.decoder.embed_tokens;
    assert!(matches!(embedding, Weight::Packed(_)));
    let ids = Tensor::new(&[7_u32, 0, 7], &Device::Cpu).unwrap();
    let expected = embedding.to_tensor().unwrap().index_select(&ids, 0).unwrap();
    assert_relative_rms("rows", &embedding.select(&ids).unwrap(), &expected, 1e-7);
}

//! Quantized weights on a CUDA GPU: kernels against their plain twin, models against the same models on the CPU.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it. It runs on a machine without Rust or
//! the checkout.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use still_attention::RowDtype;
use still_compute::random::normal;
use still_model::decoder::ops::{frozen_linear, gated};
use still_model::random::{random_model, random_model_on, tiny_config, tiny_student};
use still_model::{
    Activation, Architecture, GgufFormat, Linear, LoraConfig, LoraTarget, Model, ModelConfig,
    QuantizedMatrix, Student, Weight, WeightFormat, device, export_gguf,
};
use still_quant::{Format, FragmentFormat, Fragments, PackedMatrix};
use still_testing::{assert_relative_rms, relative_rms};

fn gpu() -> Device {
    device("cuda").unwrap_or_else(|error| panic!("these tests need a CUDA GPU: {error}"))
}

fn uniform(shape: &[usize], deviation: f64, seed: u64) -> Tensor {
    normal(&mut ChaCha8Rng::seed_from_u64(seed), shape, deviation).unwrap()
}

/// Formats of files, and their name in GGUF.
const FORMATS: [(Format, GgmlDType); 5] = [
    (Format::Q8_0, GgmlDType::Q8_0),
    (Format::Q4_0, GgmlDType::Q4_0),
    (Format::Q4_1, GgmlDType::Q4_1),
    (Format::Q4K, GgmlDType::Q4K),
    (Format::Q6K, GgmlDType::Q6K),
];

/// Rows and columns: fewer than a tile, no whole tiles, more columns than all warps take at once, more rows than one wave of blocks.
const SHAPES: [(usize, usize); 6] =
    [(5, 256), (48, 64), (37, 96), (200, 4352), (33_000, 256), (576, 1536)];

/// Random matrices of every format and of every shape that it has.
fn matrices() -> Vec<(String, Fragments)> {
    let mut all = Vec::new();
    for (format, dtype) in FORMATS {
        for (rows, columns) in SHAPES {
            if !columns.is_multiple_of(format.block_values()) {
                continue;
            }
            let values = uniform(&[rows, columns], 0.05, 3);
            let quantized = QTensor::quantize(&values, dtype).unwrap();
            let packed =
                PackedMatrix::new(format, rows, columns, &quantized.data().unwrap()).unwrap();
            let name = format!("{format:?} [{rows}, {columns}]");
            all.push((name, Fragments::of(&packed).unwrap()));
        }
    }
    let device = gpu();
    for (rows, columns) in SHAPES {
        let values = uniform(&[rows, columns], 0.05, 3).to_device(&device).unwrap();
        let matrix = QuantizedMatrix::quantize(&values, FragmentFormat::E4m3, DType::F32).unwrap();
        all.push((format!("fp8 [{rows}, {columns}]"), matrix.to_host().unwrap()));
    }
    all
}

fn twin(fragments: &Fragments) -> Tensor {
    let shape = (fragments.rows(), fragments.columns());
    Tensor::from_vec(fragments.dequantize(), shape, &Device::Cpu).unwrap()
}

fn on_host(tensor: &Tensor) -> Tensor {
    tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

#[test]
fn values_are_the_twin_s() {
    let device = gpu();
    for (case, fragments) in matrices() {
        let (expected, rows) = (twin(&fragments), fragments.rows());
        for dtype in [DType::F32, DType::BF16] {
            let matrix = QuantizedMatrix::new(fragments.clone(), &device, dtype).unwrap();
            // Rounded once.
            let bound = if dtype == DType::F32 { 1e-7 } else { 2e-5 };
            let expected = on_host(&expected.to_dtype(dtype).unwrap());
            let got = on_host(&matrix.dequantize(0..rows, dtype).unwrap());
            assert_relative_rms(&case, &got, &expected, bound);
            let got = on_host(&matrix.dequantize(3..rows - 1, dtype).unwrap());
            assert_relative_rms(&case, &got, &expected.narrow(0, 3, rows - 4).unwrap(), bound);
            let ids: Vec<u32> = [rows - 1, 0, 2, 2].map(|id| id as u32).into();
            let ids = Tensor::new(ids, &Device::Cpu).unwrap();
            let got = on_host(&matrix.select(&ids.to_device(&device).unwrap()).unwrap());
            assert_relative_rms(&case, &got, &expected.index_select(&ids, 0).unwrap(), bound);
        }
    }
}

/// Of few rows by the codes, of more by the values.
#[test]
fn products_are_the_twin_s() {
    let device = gpu();
    let mut worst = [0.0_f64; 2];
    for (case, fragments) in matrices() {
        let values = twin(&fragments).to_dtype(DType::F64).unwrap();
        for (n, dtype) in [DType::F32, DType::BF16].into_iter().enumerate() {
            let matrix = QuantizedMatrix::new(fragments.clone(), &device, dtype).unwrap();
            let weight = Weight::Quantized(matrix);
            for rows in [1, 2, 3, 4, 5, 8, 9, 40] {
                let x = uniform(&[rows, fragments.columns()], 1.0, rows as u64);
                let x = x.to_dtype(dtype).unwrap();
                let expected = x.to_dtype(DType::F64).unwrap();
                let expected = expected.matmul(&values.t().unwrap()).unwrap();
                let expected = expected.to_dtype(DType::F32).unwrap();
                let x = x.to_device(&device).unwrap();
                let got = on_host(&frozen_linear(&x, &weight, None).unwrap());
                let error = relative_rms(&got, &expected);
                // By the codes or not, in f32 the products of two planes; in bf16 the output's own rounding is most of it.
                let bound = if dtype == DType::F32 { 1e-5 } else { 3.5e-3 };
                assert!(error <= bound, "{case}, {rows} rows, {dtype:?}: {error:e}");
                worst[n] = worst[n].max(error);
            }
        }
    }
    println!("products: f32 {:.1e}, bf16 {:.1e}", worst[0], worst[1]);
}

#[test]
fn gated_products_are_the_twin_s() {
    let device = gpu();
    for (case, fragments) in matrices() {
        if fragments.rows() > 10_000 {
            continue;
        }
        let (rows, columns) = (fragments.rows(), fragments.columns());
        let plain = |seed| uniform(&[rows, columns], 0.05, seed);
        let up = plain(8);
        let x = uniform(&[2, columns], 1.0, 9);
        let linear = |weight: Weight| Linear { weight, bias: None };
        let expected = gated(
            &x,
            &linear(twin(&fragments).into()),
            &linear(up.clone().into()),
            Activation::Silu,
        );
        let matrix = QuantizedMatrix::new(fragments, &device, DType::F32).unwrap();
        let x = x.to_device(&device).unwrap();
        let gate = linear(Weight::Quantized(matrix));
        let up = linear(up.to_device(&device).unwrap().into());
        let got = gated(&x, &gate, &up, Activation::Silu).unwrap();
        assert_relative_rms(&case, &on_host(&got), &expected.unwrap(), 2e-5);
    }
}

/// Blocks made on a GPU are those that are made on the CPU.
#[test]
fn a_gpu_quantizes_as_the_cpu() {
    let device = gpu();
    for (rows, columns) in SHAPES {
        let values = uniform(&[rows, columns], 0.05, 5);
        let there = values.to_device(&device).unwrap();
        let quantized = |format| {
            let matrix = QuantizedMatrix::quantize(&there, format, DType::F32).unwrap();
            let fragments = matrix.to_host().unwrap();
            let got = on_host(&matrix.dequantize(0..rows, DType::F32).unwrap());
            assert_relative_rms("the twin's", &got, &twin(&fragments), 1e-7);
            got
        };
        let expected = QTensor::quantize(&values, GgmlDType::Q8_0).unwrap();
        let expected = expected.dequantize(&Device::Cpu).unwrap();
        assert_relative_rms("q8_0", &quantized(FragmentFormat::Q8_0), &expected, 1e-4);
        // Three bits of mantissa: half a step of at most 1/8, evenly spread, is 1/28 at most.
        assert_relative_rms("fp8", &quantized(FragmentFormat::E4m3), &values, 0.036);
    }
}

/// Models whose rows are whole blocks of every format, students of which one has updates beside its weights.
fn config(architecture: Architecture) -> ModelConfig {
    ModelConfig {
        architecture,
        hidden_size: 256,
        intermediate_size: 512,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 64,
        vocab_size: 4101,
        attention_bias: architecture == Architecture::Qwen2,
        max_position_embeddings: 4096,
        eos_token_ids: Vec::new(),
        ..tiny_config()
    }
}

fn student(config: &ModelConfig, updates: bool) -> Student {
    let mut student = tiny_student(config, |_| {}).unwrap();
    if updates {
        let targets = vec![LoraTarget::Q, LoraTarget::V, LoraTarget::O];
        student.add_lora(config, LoraConfig { rank: 5, alpha: 8.0, targets }, 4).unwrap();
        // Updates start as zeros.
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        let moved = student.map_tensors(|name, tensor| match name.contains("lora_B") {
            true => Ok(normal(&mut rng, tensor.dims(), 0.3)?),
            false => Ok(tensor.clone()),
        });
        student = moved.unwrap();
    }
    student
}

/// Models with quantized matrices on the CPU.
fn models() -> Vec<(String, Model)> {
    let dir = tempfile::tempdir().unwrap();
    let mut all = Vec::new();
    for architecture in [Architecture::Llama, Architecture::Qwen2] {
        let config = config(architecture);
        let teacher = random_model(config.clone(), 3).unwrap();
        let plain = teacher.with_student(student(&config, false));
        for format in GgufFormat::ALL {
            let path = dir.path().join(format!("{architecture:?}-{format}.gguf"));
            export_gguf(&path, &plain, format).unwrap();
            let model = Model::load(path.to_str().unwrap()).unwrap();
            all.push((format!("{architecture:?} {format}"), model));
        }
        let quantized = teacher.to_device_in(&Device::Cpu, DType::F32, WeightFormat::Q8_0).unwrap();
        let updated = quantized.with_student(student(&config, true));
        all.push((format!("{architecture:?} q8_0 and updates"), updated));
        all.push((format!("{architecture:?} q8_0, dense"), quantized));
    }
    all
}

fn ids(tokens: usize, seed: u64) -> Vec<u32> {
    (0..tokens as u64).map(|i| (((i + seed) * 2_654_435_761) >> 7) as u32 % 4101).collect()
}

/// The logits after a prompt that is read in pieces, then after each token that is fed to `batch` sequences.
fn run(model: &Model, rows: RowDtype, pieces: &[usize], batch: usize) -> Vec<f32> {
    let mut all = Vec::new();
    if batch == 1 {
        let mut cache = model.new_cache(1, rows).unwrap();
        let mut start = 0;
        for &piece in pieces {
            let hidden = model.prefill(&ids(180, 1)[start..start + piece], &mut cache).unwrap();
            all.extend(
                on_host(&model.logits(&hidden).unwrap())
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap(),
            );
            start += piece;
        }
        for n in 0..20 {
            all.extend_from_slice(model.decode(&ids(1, 50 + n), &mut cache).unwrap());
        }
        return all;
    }
    let mut cache = model.new_cache(batch, rows).unwrap();
    for n in 0..20 {
        all.extend_from_slice(model.decode(&ids(batch, 50 + n), &mut cache).unwrap());
    }
    all
}

#[test]
fn models_compute_as_on_the_cpu() {
    let device = gpu();
    let mut worst = [0.0_f64; 2];
    for (name, cpu) in models() {
        let wide = cpu.to_device(&device, DType::F32).unwrap();
        let narrow = cpu.to_device(&device, DType::BF16).unwrap();
        // The same values in bf16: what is rounded on the way there is no fault of the codes.
        let dense = cpu.to_device_in(&device, DType::BF16, WeightFormat::Dense).unwrap();
        let kept = |model: &Model| model.decoder.formats().1;
        assert_eq!(kept(&wide), kept(&cpu), "{name}: other formats than the file's");
        assert_eq!(kept(&narrow), kept(&cpu), "{name}: other formats than the file's");
        for batch in [1, 2, 3, 4, 5, 8] {
            let case = format!("{name}, {batch} sequences");
            let expected = run(&cpu, RowDtype::F32, &[180], batch);
            let got = run(&wide, RowDtype::F32, &[180], batch);
            let error = relative_rms(&got, &expected);
            assert!(error <= 3e-5, "{case}: f32 {error:e}");
            worst[0] = worst[0].max(error);
            let got = run(&narrow, RowDtype::Bf16, &[180], batch);
            let error = relative_rms(&got, &expected);
            let usual = relative_rms(&run(&dense, RowDtype::Bf16, &[180], batch), &expected);
            println!("{case}: bf16 {error:.1e}, dequantized {usual:.1e}");
            assert!(error <= 0.1 && error <= 1.5 * usual, "{case}: bf16 {error:e}, {usual:e}");
            worst[1] = worst[1].max(error);
        }
    }
    println!("models: f32 {:.1e}, bf16 {:.1e}", worst[0], worst[1]);
}

/// Read at once, in pieces, of which some take the codes' products, and token by token: the last logits are the same.
#[test]
fn any_split_of_a_prompt_gives_the_same() {
    let device = gpu();
    for (name, cpu) in models() {
        for (dtype, rows, bound) in
            [(DType::F32, RowDtype::F32, 1e-4), (DType::BF16, RowDtype::Bf16, 0.03)]
        {
            let model = cpu.to_device(&device, dtype).unwrap();
            let last = |pieces: &[usize]| {
                let logits = run(&model, rows, pieces, 1);
                logits[logits.len() - 21 * 4101..].to_vec()
            };
            let expected = last(&[180]);
            for pieces in [&[100, 3, 70, 7][..], &[1; 180]] {
                let error = relative_rms(&last(pieces), &expected);
                let count = pieces.len();
                assert!(error <= bound, "{name} {dtype:?} in {count} pieces: {error:e}");
            }
        }
    }
}

#[test]
fn random_models_take_the_form_that_is_asked_for() {
    let device = gpu();
    let config = config(Architecture::Llama);
    let bytes = |format| {
        let model = random_model_on(config.clone(), &device, DType::BF16, format).unwrap();
        let model = model.with_student(student(&config, false).to_device(&device).unwrap());
        let mut cache = model.new_cache(1, RowDtype::Bf16).unwrap();
        assert!(model.decode(&[1], &mut cache).unwrap().iter().all(|x| x.is_finite()));
        let (bytes, formats) = model.decoder.formats();
        assert_eq!(formats.len(), 1, "{formats:?}");
        (bytes, formats.into_keys().next().unwrap())
    };
    let (dense, name) = bytes(WeightFormat::File);
    assert_eq!(name, "bf16");
    for (format, most) in [(WeightFormat::Q8_0, 0.54), (WeightFormat::Fp8, 0.52)] {
        let (bytes, name) = bytes(format);
        assert_eq!(name, format.name());
        assert!(bytes as f64 <= most * dense as f64, "{format}: {bytes} of {dense} bytes");
    }
}

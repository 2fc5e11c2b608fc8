//! Both forms against definitions in float64, and against each other.

use candle_core::{Device, Tensor};
use still_testing::random_f32;

use super::*;

fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
    random_f32((rows, columns), seed)
}

/// The loss, and the gradient of just that.
fn vocabulary(
    hidden: &Tensor,
    head: &Tensor,
    target: Target<'_>,
    counted: Option<&[bool]>,
) -> Result<(f64, Tensor)> {
    let (loss, gradient) = vocabulary_loss(hidden, head, target, counted, 1.0)?;
    Ok((loss.value()?, gradient))
}

/// Log-softmax of the logits in float64.
fn log_softmax(hidden: &Tensor, head: &Tensor) -> Vec<Vec<f64>> {
    let logits: Vec<Vec<f32>> = hidden.matmul(&head.t().unwrap()).unwrap().to_vec2().unwrap();
    let row = |row: &Vec<f32>| {
        let z: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        row.iter().map(|&x| f64::from(x) - z.ln()).collect()
    };
    logits.iter().map(row).collect()
}

fn check_gradient(loss: impl Fn(&Tensor) -> (f64, Tensor), hidden: &Tensor) {
    let (_, gradient) = loss(hidden);
    let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
    let base: Vec<f32> = hidden.flatten_all().unwrap().to_vec1().unwrap();
    for i in (0..base.len()).step_by(7) {
        let at = |delta: f32| {
            let mut moved = base.clone();
            moved[i] += delta;
            loss(&Tensor::from_vec(moved, hidden.shape(), &Device::Cpu).unwrap()).0
        };
        let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
        let error = (f64::from(gradient[i]) - numeric).abs();
        assert!(error < 2e-5 + 1e-3 * numeric.abs(), "{i}: {} vs {numeric}", gradient[i]);
    }
}

#[test]
fn squared_error_equals_its_definition_over_several_parts() {
    let (x, target) = (random(150, 300, 1), random(150, 300, 2));
    let expected = (&x - &target).unwrap();
    let mean = expected.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    let (got, gradient) = mean_squared_error(&x, &target, None, 1.0).unwrap();
    let got = got.value().unwrap();
    assert!((got - f64::from(mean)).abs() < 1e-5 * got, "{got} vs {mean}");
    let expected = (expected * (2.0 / 45_000.0)).unwrap();
    let worst = (gradient - expected).unwrap().abs().unwrap().max_all().unwrap();
    assert!(worst.to_scalar::<f32>().unwrap() < 1e-9);
    assert!(mean_squared_error(&x, &random(3, 3, 1), None, 1.0).is_err());
}

#[test]
fn variance_is_that_of_all_values() {
    let x = random(150, 300, 1);
    let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / 45_000.0;
    let expected = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 45_000.0;
    assert!((variance(&x).unwrap().value().unwrap() / expected - 1.0).abs() < 1e-9);
}

#[test]
fn kl_equals_its_definition_over_several_blocks() {
    let (hidden, teacher, head) = (random(150, 6, 1), random(150, 6, 2), random(700, 6, 3));
    let (student_logs, teacher_logs) = (log_softmax(&hidden, &head), log_softmax(&teacher, &head));
    let kl: f64 = student_logs
        .iter()
        .zip(&teacher_logs)
        .map(|(s, t)| s.iter().zip(t).map(|(s, t)| t.exp() * (t - s)).sum::<f64>())
        .sum::<f64>()
        / 150.0;
    let loss = |h: &Tensor| vocabulary(h, &head, Target::Teacher(&teacher), None).unwrap();
    assert!((loss(&hidden).0 - kl).abs() < 1e-5, "{} vs {kl}", loss(&hidden).0);
    assert!(loss(&teacher).0.abs() < 1e-6);
    check_gradient(loss, &hidden);
}

#[test]
fn a_mask_is_the_mean_over_the_rows_that_it_counts() {
    let (hidden, teacher, head) = (random(300, 6, 1), random(300, 6, 2), random(90, 6, 3));
    let ids: Vec<u32> = (0..300).map(|i| i * 37 % 90).collect();
    let counted: Vec<bool> = (0..300).map(|i| i % 3 == 0 || i > 280).collect();
    let rows: Vec<usize> = (0..299).filter(|&row| counted[row + 1]).collect();
    let logs = log_softmax(&hidden, &head);
    let nll = rows.iter().map(|&row| -logs[row][ids[row + 1] as usize]).sum::<f64>();
    let loss = |h: &Tensor| vocabulary(h, &head, Target::NextToken(&ids), Some(&counted)).unwrap();
    assert!((loss(&hidden).0 - nll / rows.len() as f64).abs() < 1e-5);
    check_gradient(loss, &hidden);
    let kl = |h: &Tensor| vocabulary(h, &head, Target::Teacher(&teacher), Some(&counted)).unwrap();
    check_gradient(kl, &hidden);
    let gradient: Vec<Vec<f32>> = kl(&hidden).1.to_vec2().unwrap();
    for (row, gradient) in gradient.iter().enumerate() {
        assert_eq!(gradient.iter().any(|&g| g != 0.0), rows.contains(&row), "row {row}");
    }
    let nothing = vec![false; 300];
    let (loss, gradient) =
        vocabulary(&hidden, &head, Target::Teacher(&teacher), Some(&nothing)).unwrap();
    assert_eq!(
        (loss, gradient.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()),
        (0.0, 0.0)
    );
    assert!(vocabulary(&hidden, &head, Target::NextToken(&ids), Some(&nothing[1..])).is_err());
}

#[test]
fn cross_entropy_equals_its_definition() {
    let (hidden, head) = (random(140, 6, 1), random(90, 6, 3));
    let ids: Vec<u32> = (0..140).map(|i| i * 37 % 90).collect();
    let logs = log_softmax(&hidden, &head);
    let nll = (0..139).map(|i| -logs[i][ids[i + 1] as usize]).sum::<f64>() / 139.0;
    let loss = |h: &Tensor| vocabulary(h, &head, Target::NextToken(&ids), None).unwrap();
    assert!((loss(&hidden).0 - nll).abs() < 1e-5);
    check_gradient(loss, &hidden);
    let last: Vec<f32> = loss(&hidden).1.get(139).unwrap().to_vec1().unwrap();
    assert!(last.iter().all(|&g| g == 0.0), "the last token predicts nothing");
}

#[test]
fn a_mixture_is_the_weighted_sum_of_both_in_loss_and_gradient() {
    let (hidden, teacher, head) = (random(300, 6, 1), random(300, 6, 2), random(90, 6, 3));
    let ids: Vec<u32> = (0..300).map(|i| i * 37 % 90).collect();
    let of = |target| vocabulary(&hidden, &head, target, None).unwrap();
    let (kl, d_kl) = of(Target::Teacher(&teacher));
    let (nll, d_nll) = of(Target::NextToken(&ids));
    for share in [0.0, 0.3, 1.0] {
        let (loss, gradient) = of(Target::Mixed { teacher: &teacher, ids: &ids, kl: share });
        assert!((loss - (share * kl + (1.0 - share) * nll)).abs() < 1e-6);
        let expected = ((&d_kl * share).unwrap() + (&d_nll * (1.0 - share)).unwrap()).unwrap();
        let worst = (gradient - expected).unwrap().abs().unwrap().max_all().unwrap();
        assert!(worst.to_scalar::<f32>().unwrap() < 1e-7);
    }
}

/// Two results of one loss: equal, gradients included, up to rounding.
fn assert_same(a: (Scalar, Tensor), b: (Scalar, Tensor), what: &str) {
    let (x, y) = (a.0.value().unwrap(), b.0.value().unwrap());
    assert!((x - y).abs() <= 2e-6 * y.abs().max(1e-2), "{what}: loss {x} and {y}");
    assert_eq!(a.1.dims(), b.1.dims(), "{what}");
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let (error, size) = (norm(&(&a.1 - &b.1).unwrap()), norm(&b.1));
    assert!(size > 0.0 && error <= 1e-5 * size, "{what}: gradients differ by {error} of {size}");
}

#[test]
fn a_devices_squared_error_is_the_cpus() {
    let (x, target) = (random(150, 300, 1), random(150, 300, 2));
    let (x, target) =
        (x.reshape((1, 3, 50, 300)).unwrap(), target.reshape((1, 3, 50, 300)).unwrap());
    let (a, b) = (device::variance(&x).unwrap(), cpu::variance(&x).unwrap());
    assert!(matches!(a, Scalar::Device(_)));
    assert!((a.value().unwrap() / b.value().unwrap() - 1.0).abs() < 1e-5);
    for (a, b) in [(None, None), (Some(&a), Some(&b))] {
        assert_same(
            device::mean_squared_error(&x, &target, a, 0.3).unwrap(),
            cpu::mean_squared_error(&x, &target, b, 0.3).unwrap(),
            "squared error",
        );
    }
}

#[test]
fn a_devices_vocabulary_loss_is_the_cpus() {
    // Rows of one block of each form and of several.
    for (rows, vocab) in [(300, 90), (20, 700), (1, 90)] {
        let (hidden, teacher) = (random(rows, 6, 1), random(rows, 6, 2));
        let head = (random(vocab, 6, 3) * 2.0).unwrap();
        let ids: Vec<u32> = (0..rows as u32).map(|i| i * 37 % 90).collect();
        let before_last = &ids[1..];
        for (what, target) in [
            ("divergence", Target::Teacher(&teacher)),
            ("all ids", Target::NextToken(&ids)),
            ("all but one", Target::NextToken(before_last)),
            ("mixed", Target::Mixed { teacher: &teacher, ids: before_last, kl: 0.3 }),
            ("mixed, all ids", Target::Mixed { teacher: &teacher, ids: &ids, kl: 0.9 }),
        ] {
            let what = format!("{what}, {rows} rows of {vocab}");
            let a = device::rows_loss_by(64, &hidden, &head, target, 0.4).unwrap();
            let b = cpu::rows_loss(&hidden, &head, target, 0.4).unwrap();
            if target.shares(rows).rows > 0 {
                assert!(matches!(a.0, Scalar::Device(_)), "{what}");
                assert_same(a, b, &what);
            } else {
                assert_eq!((a.0.value().unwrap(), b.0.value().unwrap()), (0.0, 0.0), "{what}");
            }
        }
    }
}

#[test]
fn a_devices_blocks_are_of_whole_tiles_however_large_the_vocabulary() {
    assert_eq!([49_152, 128_256, 1 << 30].map(device::block_rows), [1280, 512, 128]);
}

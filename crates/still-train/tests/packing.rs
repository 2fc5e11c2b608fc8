//! Documents packed into a window give what they give alone; a mask counts what it says.

mod common;

use common::{model, recipe};
use still_model::{Model, Student};
use still_train::{FinetuneStage, Recipe, StepReport, TransferStage, Window};

fn ids(length: u32, n: u32) -> Vec<u32> {
    (0..length).map(|t| (t * t + 7 * (t % 11) + 31 * n) % 256).collect()
}

fn packed(documents: &[Vec<u32>]) -> Window {
    let mut window = Window::default();
    documents.iter().for_each(|ids| window.push(ids, None));
    window
}

fn alone(documents: &[Vec<u32>]) -> Vec<Window> {
    documents.iter().map(|ids| Window::from(ids.clone())).collect()
}

fn student(model: &Model, recipe: &Recipe) -> Student {
    let still = recipe.attention.resolve(model.config()).unwrap();
    Student::init(still, model.config(), recipe.attention.init, 3).unwrap()
}

/// One step of each stage: its report, and the tensors as it left them.
fn steps(recipe: &Recipe, windows: &[Window]) -> [(StepReport, Vec<f32>); 2] {
    let model = model();
    let student = student(&model, recipe);
    let values = |student: &Student| {
        let mut all = Vec::new();
        student
            .map_tensors(|_, tensor| {
                all.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
                Ok(tensor.clone())
            })
            .unwrap();
        all
    };
    let mut transfer = TransferStage::new(&model, &student, &recipe.transfer).unwrap();
    let first = transfer.step(windows).unwrap().report;
    let mut finetune = FinetuneStage::new(&model, &student, &recipe.finetune, 3).unwrap();
    let second = finetune.step(windows, None).unwrap();
    [(first, values(&transfer.student().unwrap())), (second, values(&finetune.student().unwrap()))]
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-5 * b.abs().max(1e-3)
}

/// Segments of one window are trained on as windows of their own are: losses, gradients and the step they lead to.
#[test]
fn a_packed_document_gives_what_it_gives_alone() {
    for objective in ["logit_kl", "cross_entropy"] {
        let recipe = recipe(&[&format!("finetune.objective={objective}")]);
        // Of equal lengths: the same to the last bit.
        let even = [ids(30, 1), ids(30, 2)];
        let (together, apart) = (steps(&recipe, &[packed(&even)]), steps(&recipe, &alone(&even)));
        for ((together, values), (apart, expected)) in together.iter().zip(&apart) {
            assert_eq!(together.loss.to_bits(), apart.loss.to_bits());
            assert_eq!(together.grad_norm.to_bits(), apart.grad_norm.to_bits());
            assert_eq!(values, expected);
            assert_eq!(together.tokens, 60);
        }
        // Tokens weigh the same, whichever document they are of: a document with twice as many counted positions
        // weighs as two.
        let uneven = match objective {
            "logit_kl" => [ids(40, 1), ids(20, 2)],
            _ => [ids(41, 1), ids(21, 2)],
        };
        let thrice = [uneven[0].clone(), uneven[0].clone(), uneven[1].clone()];
        let together = steps(&recipe, &[packed(&uneven)]);
        let apart = steps(&recipe, &alone(&thrice));
        let finetune = [(&together[1], &apart[1])];
        let transfer = (objective == "logit_kl").then_some((&together[0], &apart[0]));
        for ((together, _), (apart, _)) in finetune.into_iter().chain(transfer) {
            assert!(close(together.loss, apart.loss), "{} vs {}", together.loss, apart.loss);
            assert!(close(together.grad_norm, apart.grad_norm));
        }
    }
}

/// The teacher's hidden states that stage 1 leaves fit the segments that stage 2 reads.
#[test]
fn hidden_states_are_handed_on_by_segment() {
    let (model, recipe) = (model(), recipe(&[]));
    let student = student(&model, &recipe);
    let batch = [packed(&[ids(20, 1), ids(30, 2)]), Window::from(ids(25, 3))];
    let mut transfer = TransferStage::new(&model, &student, &recipe.transfer).unwrap();
    let hidden = transfer.step(&batch).unwrap().teacher_hidden;
    let loss = |hidden: Option<&[candle_core::Tensor]>| {
        let mut stage = FinetuneStage::new(&model, &student, &recipe.finetune, 3).unwrap();
        stage.step(&batch, hidden).unwrap().loss
    };
    assert!(close(loss(Some(&hidden)), loss(None)));
}

/// Stage 2 reads the whole sequence and counts what the mask says; stage 1 counts every position.
#[test]
fn a_mask_decides_what_stage_2_counts() {
    let recipe = recipe(&["finetune.objective=cross_entropy"]);
    let ids = ids(30, 1);
    let masked = |counted: &dyn Fn(usize) -> bool| {
        let mut window = Window::default();
        window.push(&ids, Some(&(0..30).map(counted).collect::<Vec<_>>()));
        steps(&recipe, &[window])
    };
    let whole = steps(&recipe, &[Window::from(ids.clone())]);
    let (first, second, everything) =
        (masked(&|t| t < 10), masked(&|t| t >= 10), masked(&|_| true));
    assert_eq!(everything[1].0.loss.to_bits(), whole[1].0.loss.to_bits());
    // Nine predictions of the first ten tokens, twenty of the others.
    let mean = (9.0 * first[1].0.loss + 20.0 * second[1].0.loss) / 29.0;
    assert!(close(mean, whole[1].0.loss), "{mean} vs {}", whole[1].0.loss);
    assert!(!close(first[1].0.loss, second[1].0.loss));
    assert_eq!(first[0], whole[0], "attention transfer counts all");
    // A window that counts nothing teaches nothing.
    let nothing = masked(&|_| false);
    assert_eq!((nothing[1].0.loss, nothing[1].0.grad_norm), (0.0, 0.0));
}

//! A layer on tensors that saves what its backward pass needs, and that pass.
//!
//! The tensor library's graph makes a tensor of zeros for every gradient and adds to it; here each gradient is written once,
//! products add to what is there, and what is saved is chosen.

use candle_core::{Shape, Tensor};
use still_attention::{AttentionGradients, HybridConfig, HybridWeights};
use still_attention::{
    SavedAttention, attention_forward, sliding_attention, sliding_attention_backward,
};
use still_compute::Gradients;

use super::layer::AttentionInputs;
use super::layer_ops::{LayerOps, Norm, Projected, Projection, RopeBase};
use super::linear::Linear;
use super::ops::linear::rows;
use super::ops::plain::{
    Update, activated, activated_backward, dropped, heads_backward, linear, linear_backward,
    low_rank, norm_backward,
};
use super::ops::{Rotation, merge_heads, rms_norm, rms_norm_heads, split_heads};
use crate::config::Activation;
use crate::error::Result;

/// An activation: rows `[B · N, width]`, or heads `[B, H, N, D]`.
#[derive(Clone, Debug)]
pub struct Value {
    id: usize,
    /// The values, in no graph.
    pub tensor: Tensor,
}

/// Rows as projections take them.
#[derive(Clone, Debug)]
pub struct Input<'w> {
    value: Value,
    /// What they are the norm of: they can be computed again.
    normed: Option<(Tensor, Norm<'w>)>,
}

/// [`LayerOps`] that saves activations.
#[derive(Debug)]
pub struct SavingOps<'w> {
    head_dim: usize,
    rotation: Rotation,
    /// Whether the MLP's two wide activations are saved; otherwise the backward pass computes them again.
    saves_wide: bool,
    /// `(batch, tokens)`
    shape: (usize, usize),
    saved: Vec<Saved<'w>>,
    /// Of every value: whether something learned, or an input whose gradient is wanted, lies below it.
    learns: Vec<bool>,
}

/// An operation that was carried out.
#[derive(Debug)]
enum Saved<'w> {
    Norm {
        x: Value,
        norm: Norm<'w>,
        y: usize,
    },
    Project {
        x: usize,
        input: Option<Tensor>,
        projected: Vec<Done<'w>>,
    },
    ProjectOnto {
        onto: usize,
        x: usize,
        input: Option<Tensor>,
        projected: Done<'w>,
        /// What was projected, if it went through a norm.
        before: Option<(Tensor, Norm<'w>)>,
    },
    Gated {
        x: usize,
        wide: Wide<'w>,
        gate: Projection<'w>,
        up: Projection<'w>,
        activation: Activation,
        y: usize,
    },
    Heads {
        rows: usize,
        before: Option<(Tensor, Norm<'w>)>,
        rope: Option<RopeBase>,
        y: usize,
    },
    OutputGate {
        rows: usize,
        gate: Tensor,
        y: usize,
    },
    Sliding {
        of: [usize; 3],
        qkv: [Tensor; 3],
        window: usize,
        logit_scale: Option<f64>,
        y: usize,
    },
    Attention {
        of: [usize; 3],
        gate: Option<usize>,
        saved: Box<SavedAttention>,
        y: usize,
    },
}

/// Where the backward pass has an MLP's wide activations from.
#[derive(Debug)]
enum Wide<'w> {
    Saved([Tensor; 2]),
    OfNorm(Tensor, Norm<'w>),
    Of(Tensor),
}

/// A projection that was carried out.
#[derive(Debug)]
struct Done<'w> {
    projection: Projection<'w>,
    update: Option<Update>,
    y: usize,
}

impl<'w> SavingOps<'w> {
    /// For `x` `[B, N, E]`, whose gradient is wanted or not; the second is its value, to be given to the layer.
    ///
    /// # Errors
    /// A tensor of other dimensions.
    pub fn new(
        x: &Tensor,
        wants_input: bool,
        head_dim: usize,
        rotation: &Rotation,
        saves_wide: bool,
    ) -> Result<(Self, Value)> {
        let (batch, tokens, _) = x.dims3()?;
        let mut ops = Self {
            head_dim,
            rotation: rotation.clone(),
            saves_wide,
            shape: (batch, tokens),
            saved: Vec::new(),
            learns: Vec::new(),
        };
        let x = ops.value(rows(&x.detach())?, wants_input);
        Ok((ops, x))
    }

    fn value(&mut self, tensor: Tensor, learns: bool) -> Value {
        self.learns.push(learns);
        Value { id: self.learns.len() - 1, tensor }
    }

    /// Hybrid attention of a student's layer, as rows.
    ///
    /// # Errors
    /// As [`attention_forward`].
    pub fn attend(
        &mut self,
        inputs: &AttentionInputs<Value>,
        weights: &HybridWeights,
        config: &HybridConfig,
    ) -> Result<Value> {
        let AttentionInputs { q, k, v, gate } = inputs;
        let of = [q.id, k.id, v.id];
        let wants_rows = of.iter().any(|&id| self.learns[id]);
        let qkv = [&q.tensor, &k.tensor, &v.tensor];
        let open = gate.as_ref().map(|gate| &gate.tensor);
        let (output, saved) = attention_forward(qkv, open, weights, config, None, wants_rows)?;
        let value = self.value(rows(&merge_heads(&output.out)?)?, true);
        let gate = gate.as_ref().map(|gate| gate.id);
        self.saved.push(Saved::Attention { of, gate, saved: Box::new(saved), y: value.id });
        Ok(value)
    }

    /// Attention to the last `window` tokens, of a layer that keeps it, as rows. Logits are `q·k` times `logit_scale`.
    ///
    /// # Errors
    /// As [`sliding_attention`].
    pub fn attend_sliding(
        &mut self,
        inputs: &AttentionInputs<Value>,
        window: usize,
        logit_scale: Option<f64>,
    ) -> Result<Value> {
        let AttentionInputs { q, k, v, .. } = inputs;
        let out = sliding_attention(&q.tensor, &k.tensor, &v.tensor, window, logit_scale)?;
        let of = [q.id, k.id, v.id];
        let value = self.value(rows(&merge_heads(&out)?)?, self.learns[q.id]);
        if self.learns[q.id] {
            let qkv = [q, k, v].map(|value| value.tensor.clone());
            self.saved.push(Saved::Sliding { of, qkv, window, logit_scale, y: value.id });
        }
        Ok(value)
    }

    /// What is saved on the way to `output`.
    pub fn into_saved(self, output: &Value) -> SavedActivations<'w> {
        SavedActivations { ops: self, output: output.id, shape: output.tensor.shape().clone() }
    }

    /// Rows of a value as `[B, N, width]`.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn by_token(&self, value: &Value) -> Result<Tensor> {
        Ok(value.tensor.reshape((self.shape.0, self.shape.1, ()))?)
    }

    fn carry_out(&mut self, x: &Value, projection: &Projection<'w>) -> Result<(Tensor, Done<'w>)> {
        let Projection { linear: frozen, lora, learned, .. } = projection;
        let y = linear(&x.tensor, frozen)?;
        let (y, update) = match lora {
            Some(lora) => low_rank(&x.tensor, lora, y).map(|(y, update)| (y, Some(update)))?,
            None => (y, None),
        };
        let learns = self.learns[x.id] || update.is_some() || learned.is_some();
        let value = self.value(y, learns);
        let done = Done { projection: projection.clone(), update, y: value.id };
        Ok((value.tensor, done))
    }
}

impl Done<'_> {
    /// Whether its backward pass reads what was projected.
    fn reads_input(&self) -> bool {
        self.update.is_some() || self.projection.learned.is_some()
    }

    /// Adds the gradients of what is learned; returns that of `x` that does not come through the weight.
    fn backward(
        &self,
        input: Option<&Tensor>,
        dy: &Tensor,
        wanted: bool,
        grads: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let Some(x) = input.filter(|_| self.reads_input()) else { return Ok(None) };
        if let Some(weight) = self.projection.learned {
            grads.add_product(weight, 1.0, &dy.t()?, x)?;
        }
        let (Some(lora), Some(update)) = (self.projection.lora, &self.update) else {
            return Ok(None);
        };
        let dropout = lora.dropout.as_ref();
        let up = update.up(dy, lora.scale)?;
        grads.add_product(&lora.a, 1.0, &up.t()?, &dropped(x, dropout)?)?;
        grads.add_product(&lora.b, lora.scale, &dy.t()?, &update.low)?;
        Ok(wanted.then(|| update.through(&up, dropout)).transpose()?)
    }
}

impl<'w> LayerOps<'w> for SavingOps<'w> {
    type Rows = Value;
    type Input = Input<'w>;
    type Heads = Value;

    fn norm(&mut self, x: &Value, norm: Norm<'w>) -> Result<Input<'w>> {
        let y = rms_norm(&x.tensor, norm.weight, norm.eps)?;
        let value = self.value(y, self.learns[x.id]);
        self.saved.push(Saved::Norm { x: x.clone(), norm, y: value.id });
        Ok(Input { value, normed: Some((x.tensor.clone(), norm)) })
    }

    fn input(&mut self, x: &Value) -> Input<'w> {
        Input { value: x.clone(), normed: None }
    }

    fn project(
        &mut self,
        x: &Input<'w>,
        projections: &[Projection<'w>],
    ) -> Result<Projected<Value>> {
        let (mut values, mut projected) = (Projected::new(), Vec::with_capacity(4));
        for projection in projections {
            let (tensor, done) = self.carry_out(&x.value, projection)?;
            values.push(Value { id: done.y, tensor });
            projected.push(done);
        }
        let input = projected.iter().any(Done::reads_input).then(|| x.value.tensor.clone());
        self.saved.push(Saved::Project { x: x.value.id, input, projected });
        Ok(values)
    }

    fn project_onto(
        &mut self,
        onto: Value,
        x: &Input<'w>,
        projection: Projection<'w>,
        norm: Option<Norm<'w>>,
    ) -> Result<Value> {
        let (y, projected) = self.carry_out(&x.value, &projection)?;
        self.learns[projected.y] |= self.learns[onto.id];
        let normed = match norm {
            Some(Norm { weight, eps }) => &rms_norm(&y, weight, eps)?,
            None => &y,
        };
        let sum = super::ops::residual(&onto.tensor, normed)?;
        let before = norm.map(|norm| (y, norm));
        let input = projected.reads_input().then(|| x.value.tensor.clone());
        let value = Value { id: projected.y, tensor: sum };
        let (onto, x) = (onto.id, x.value.id);
        self.saved.push(Saved::ProjectOnto { onto, x, input, projected, before });
        Ok(value)
    }

    fn gated(
        &mut self,
        x: &Input<'w>,
        gate: Projection<'w>,
        up: Projection<'w>,
        activation: Activation,
    ) -> Result<Input<'w>> {
        let wide = [linear(&x.value.tensor, &gate.linear)?, linear(&x.value.tensor, &up.linear)?];
        let hidden = activated(activation, &wide[0], &wide[1])?;
        let wide = match (&x.normed, self.saves_wide) {
            (_, true) => Wide::Saved(wide),
            (Some((rows, norm)), false) => Wide::OfNorm(rows.clone(), *norm),
            (None, false) => Wide::Of(x.value.tensor.clone()),
        };
        let value = self.value(hidden, self.learns[x.value.id]);
        let (x, y) = (x.value.id, value.id);
        self.saved.push(Saved::Gated { x, wide, gate, up, activation, y });
        Ok(Input { value, normed: None })
    }

    fn heads(&mut self, x: Value, norm: Option<Norm<'w>>, rope: Option<RopeBase>) -> Result<Value> {
        let by_token = self.by_token(&x)?;
        let normed = match norm {
            Some(Norm { weight, eps }) => rms_norm_heads(&by_token, weight, eps)?,
            None => by_token,
        };
        let rotation = rope.map(|base| self.rotation.of(base)).transpose()?;
        let heads = split_heads(&normed, self.head_dim, rotation)?;
        let value = self.value(heads, self.learns[x.id]);
        let before = norm.filter(|_| self.learns[x.id]).map(|norm| (x.tensor, norm));
        self.saved.push(Saved::Heads { rows: x.id, before, rope, y: value.id });
        Ok(value)
    }

    fn output_gate(&mut self, x: Value) -> Result<Value> {
        let gate = (x.tensor.neg()?.exp()? + 1.0)?.recip()?;
        let by_token = gate.reshape((self.shape.0, self.shape.1, ()))?;
        let heads = split_heads(&by_token, self.head_dim, None)?;
        let value = self.value(heads, self.learns[x.id]);
        self.saved.push(Saved::OutputGate { rows: x.id, gate, y: value.id });
        Ok(value)
    }
}

/// What the backward pass from one value to the input needs.
#[derive(Debug)]
pub struct SavedActivations<'w> {
    ops: SavingOps<'w>,
    output: usize,
    shape: Shape,
}

impl SavedActivations<'_> {
    /// From the gradient of the output, rows as `[B, N, width]` or heads, to that of the input `[B, N, E]`, none if it is not wanted.
    /// Gradients of what is learned are added to `grads`.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn backward(self, dy: &Tensor, grads: &mut Gradients) -> Result<Option<Tensor>> {
        let Self { ops, output, shape } = self;
        let SavingOps { head_dim, rotation, shape: (batch, tokens), saved, learns, .. } = ops;
        let mut upstream = Upstream { of: vec![None; learns.len()], learns };
        upstream.of[output] = Some(dy.contiguous()?.reshape(shape)?);
        for done in saved.into_iter().rev() {
            upstream.back(done, (batch, tokens), head_dim, &rotation, grads)?;
        }
        let dx = upstream.of[0].take().filter(|_| upstream.learns[0]);
        Ok(dx.map(|dx| dx.reshape((batch, tokens, ()))).transpose()?)
    }
}

/// Gradients of values in a backward pass.
struct Upstream {
    of: Vec<Option<Tensor>>,
    learns: Vec<bool>,
}

impl Upstream {
    /// The gradient of `y`, if it has one and its input `x` needs one.
    fn take(&mut self, y: usize, x: usize) -> Option<Tensor> {
        self.of[y].take().filter(|_| self.learns[x])
    }

    /// Adds to the gradient of a value what comes through projections of it.
    fn add_projected(
        &mut self,
        x: usize,
        projected: &[(&Done<'_>, Tensor)],
        input: Option<&Tensor>,
        grads: &mut Gradients,
    ) -> Result<()> {
        let wanted = self.learns[x];
        let mut onto = self.of[x].take();
        if wanted {
            let outputs: Vec<_> =
                projected.iter().map(|(done, dy)| (dy, &done.projection.linear.weight)).collect();
            onto = Some(linear_backward(&outputs, onto)?);
        }
        for (done, dy) in projected {
            if let Some(through_update) = done.backward(input, dy, wanted, grads)? {
                onto = Some(match onto {
                    Some(onto) => super::ops::residual(&through_update, &onto)?,
                    None => through_update,
                });
            }
        }
        self.of[x] = onto;
        Ok(())
    }

    fn back(
        &mut self,
        done: Saved<'_>,
        (batch, tokens): (usize, usize),
        head_dim: usize,
        rotation: &Rotation,
        grads: &mut Gradients,
    ) -> Result<()> {
        match done {
            Saved::Norm { x, norm, y } => {
                let Some(dy) = self.take(y, x.id) else { return Ok(()) };
                let add = self.of[x.id].take();
                let dx = norm_backward(&x.tensor, norm.weight, norm.eps, &dy, add.as_ref())?;
                self.of[x.id] = Some(dx);
            }
            Saved::Project { x, input, projected } => {
                let with_gradients: Vec<_> = projected
                    .iter()
                    .filter_map(|done| Some((done, self.of[done.y].take()?)))
                    .collect();
                self.add_projected(x, &with_gradients, input.as_ref(), grads)?;
            }
            Saved::ProjectOnto { onto, x, input, projected, before } => {
                let Some(mut dy) = self.of[projected.y].take() else { return Ok(()) };
                if self.learns[onto] {
                    self.of[onto] = Some(match self.of[onto].take() {
                        Some(other) => super::ops::residual(&other, &dy)?,
                        None => dy.clone(),
                    });
                }
                if let Some((y, Norm { weight, eps })) = &before {
                    dy = norm_backward(y, weight, *eps, &dy, None)?;
                }
                self.add_projected(x, &[(&projected, dy)], input.as_ref(), grads)?;
            }
            Saved::Gated { x, wide, gate, up, activation, y } => {
                let Some(dy) = self.take(y, x) else { return Ok(()) };
                let linears = [&*gate.linear, &*up.linear];
                let onto = self.of[x].take();
                self.of[x] = Some(gated_backward(wide, linears, activation, dy, onto)?);
            }
            Saved::Heads { rows, before, rope, y } => {
                let Some(dy) = self.take(y, rows) else { return Ok(()) };
                let rotation = rope.map(|base| rotation.of(base)).transpose()?;
                let d = heads_backward(&dy, rotation)?;
                self.of[rows] = Some(match before {
                    Some(before) => head_norm_backward(before, &d, (batch * tokens, head_dim))?,
                    None => d,
                });
            }
            Saved::OutputGate { rows, gate, y } => {
                let Some(dy) = self.take(y, rows) else { return Ok(()) };
                let d = heads_backward(&dy, None)?;
                // σ' = σ (1 − σ)
                self.of[rows] = Some((d * (&gate * gate.affine(-1.0, 1.0)?)?)?);
            }
            Saved::Sliding { of, qkv, window, logit_scale, y } => {
                let Some(dy) = self.of[y].take() else { return Ok(()) };
                let by_head = dy.reshape((batch, tokens, (), head_dim))?.transpose(1, 2)?;
                let by_head = by_head.contiguous()?;
                let qkv = qkv.each_ref();
                let gradients = sliding_attention_backward(qkv, &by_head, window, logit_scale)?;
                for (id, d) in of.into_iter().zip(gradients) {
                    self.of[id] = Some(d);
                }
            }
            Saved::Attention { of, gate, saved, y } => {
                let Some(dy) = self.of[y].take() else { return Ok(()) };
                let by_head = dy.reshape((batch, tokens, (), head_dim))?.transpose(1, 2)?;
                let AttentionGradients { qkv, gate: d_gate } = saved.backward(&by_head, grads)?;
                let of_rows = of.into_iter().zip(qkv.into_iter().flatten());
                for (id, d) in of_rows.chain(gate.zip(d_gate)) {
                    self.of[id] = Some(d);
                }
            }
        }
        Ok(())
    }
}

/// The gradient of the input of `activation(gate(x)) ⊙ up(x)` from that of the result, added to `onto`.
fn gated_backward(
    wide: Wide<'_>,
    [gate, up]: [&Linear; 2],
    activation: Activation,
    dy: Tensor,
    onto: Option<Tensor>,
) -> Result<Tensor> {
    let again = |x: &Tensor| -> Result<[Tensor; 2]> { Ok([linear(x, gate)?, linear(x, up)?]) };
    let [wide_gate, wide_up] = match wide {
        Wide::Saved(wide) => wide,
        Wide::OfNorm(x, norm) => again(&rms_norm(&x, norm.weight, norm.eps)?)?,
        Wide::Of(x) => again(&x)?,
    };
    let [d_gate, d_up] = activated_backward(activation, &wide_gate, &wide_up, &dy)?;
    drop((wide_gate, wide_up, dy));
    Ok(linear_backward(&[(&d_gate, &gate.weight), (&d_up, &up.weight)], onto)?)
}

/// The gradient of rows from that of their heads' norm; `before`: the rows and the norm.
fn head_norm_backward(
    (before, Norm { weight, eps }): (Tensor, Norm<'_>),
    d: &Tensor,
    (rows, head_dim): (usize, usize),
) -> Result<Tensor> {
    let heads = (rows, (), head_dim);
    let (before, by_head) = (before.reshape(heads)?, d.reshape(heads)?);
    Ok(norm_backward(&before, weight, eps, &by_head, None)?.reshape(d.shape())?)
}

//! A student whose learned tensors are variables.

use candle_core::{Device, Var};
use still_model::Student;

use crate::error::Result;
use crate::optimizer::Parameters;

/// Makes variables on `device` of the tensors that `wanted` names; the returned student runs on them, there.
pub(crate) fn trainable(
    student: &Student,
    device: &Device,
    wanted: impl Fn(&str) -> bool,
) -> Result<(Student, Parameters)> {
    let mut parameters = Vec::new();
    let student = student.map_tensors(|name, tensor| {
        let tensor = tensor.to_device(device)?;
        if !wanted(name) {
            return Ok(tensor);
        }
        let var = Var::from_tensor(&tensor)?;
        parameters.push((name.to_owned(), var.clone()));
        Ok(var.as_tensor().clone())
    })?;
    Ok((student, parameters))
}

/// The student with plain copies of its tensors: later steps do not change it.
pub(crate) fn detached(student: &Student) -> Result<Student> {
    Ok(student.map_tensors(|_, tensor| Ok(tensor.detach().copy()?))?)
}

/// Whether a tensor belongs to the attention (feature maps, reflections, `ℓ`, `w`, gate), not to a low-rank update.
pub(crate) fn is_attention(name: &str) -> bool {
    !name.contains(".lora_")
}

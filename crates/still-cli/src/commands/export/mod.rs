//! `still export`: a student as one file with quantized weights, as a folder that transformers opens, or as a delta.

mod card;
mod delta;
mod gguf;
mod transformers;

use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::Args;
use still_attention::{KeyExponents, StillConfig};
use still_model::files::parent;
use still_model::{GgufFormat, Model, StudentTarget};
use still_train::Budgets;

use self::card::About;
use super::model::{ModelArg, Place, load};
use crate::args::one_of;
use crate::errors::user;
use crate::outputs::{Existing, existing_ancestor, writable};
use crate::printer::Printer;

const EXAMPLES: &str = "\
Examples:
  still export --model my-student --gguf q4_1 --out my-student.gguf
  still export --model my-student --gguf q8_0 --out my-student.gguf --overwrite
  still export --model my-student --delta my-delta --dtype bf16
  still export --model my-student --transformers my-folder
  still export --model old --delta new --key-exponents budgets.json
  still export --model s --transformers f --base org/name --license apache-2.0";

/// Dtypes of a folder's weights.
const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// `still export`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ExportArgs {
    /// The student.
    #[command(flatten)]
    model: ModelArg,
    /// Format of the weights, the vocabulary's aside, which has 8 bits; low-rank updates are merged first. Where rows are no
    /// whole blocks of q4_k they take q4_1
    #[arg(long, value_name = "FORMAT", value_parser = one_of(&GgufFormat::ALL, GgufFormat::name))]
    #[arg(requires = "out", required_unless_present_any = ["transformers", "delta"])]
    gguf: Option<GgufFormat>,
    /// File to write; its name must end in .gguf
    #[arg(long, short, value_name = "FILE", requires = "gguf")]
    out: Option<PathBuf>,
    /// Folder to write: all weights, low-rank updates merged, the code that transformers opens it with, and a model card
    #[arg(long, value_name = "DIR", conflicts_with_all = ["gguf", "out"])]
    transformers: Option<PathBuf>,
    /// Folder to write: only what the student has learned, and which base it is of; not of a full student
    #[arg(long, value_name = "DIR", conflicts_with_all = ["gguf", "out", "transformers"])]
    delta: Option<PathBuf>,
    /// Dtype of a folder's weights; of a delta, of the matrices that it has learned
    #[arg(long, value_name = "DTYPE", default_value = "bf16", value_parser = one_of(&DTYPES, |dtype| dtype.as_str()))]
    #[arg(conflicts_with = "gguf")]
    dtype: DType,
    /// Scale the keys of rows in int8 or int4 by the exponents that `still calibrate --out` found for the student's base: a student
    /// that has none need not be trained again
    #[arg(long, value_name = "FILE")]
    key_exponents: Option<PathBuf>,
    /// Replace what is there
    #[arg(long)]
    overwrite: bool,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
    /// What the model card says.
    #[command(flatten)]
    about: About,
}

/// What is written, and where.
#[derive(Debug)]
pub struct Settings {
    model: String,
    /// The file that they are in.
    key_exponents: Option<PathBuf>,
    target: Target,
    existing: Existing,
    json: bool,
}

#[derive(Debug)]
enum Target {
    Gguf { format: GgufFormat, out: PathBuf },
    Folder { dir: PathBuf, dtype: DType, about: About },
    Delta { dir: PathBuf, dtype: DType },
}

impl ExportArgs {
    /// # Errors
    /// A name that is none of a GGUF file.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        let target = match (self.gguf, self.out, self.transformers, self.delta) {
            (Some(format), Some(out), ..) => {
                if out.extension().is_none_or(|extension| extension != "gguf") {
                    return Err(user(
                        format!("{} is not the name of a GGUF file", out.display()),
                        "choose a name that ends in .gguf: it is what tells the file's format",
                    ));
                }
                Target::Gguf { format, out }
            }
            (_, _, Some(dir), _) => Target::Folder { dir, dtype: self.dtype, about: self.about },
            (_, _, _, Some(dir)) => Target::Delta { dir, dtype: self.dtype },
            _ => anyhow::bail!("no form to export, which the parser lets nobody do"),
        };
        let existing = Existing::overwrite(self.overwrite);
        let (model, key_exponents) = (self.model.model, self.key_exponents);
        Ok(Settings { model, key_exponents, target, existing, json: self.json })
    }
}

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let report = match &settings.target {
        Target::Gguf { format, out } => gguf::write(settings, *format, out, printer)?,
        Target::Folder { dir, dtype, about } => {
            transformers::write(settings, dir, *dtype, about, printer)?
        }
        Target::Delta { dir, dtype } => delta::write(settings, dir, *dtype, printer)?,
    };
    match settings.json {
        true => printer.json(&report),
        false => Ok(()),
    }
}

/// A folder that is not there, or may be replaced: claimed before any work is done. `option` named it.
fn claim_folder(settings: &Settings, option: &str, dir: &Path) -> anyhow::Result<StudentTarget> {
    const CHOOSE: &str = "choose another folder";
    if let (Ok(model), Ok(real)) = (Path::new(&settings.model).canonicalize(), dir.canonicalize())
        && model == real
    {
        return Err(user(format!("{option} {} is the student itself", dir.display()), CHOOSE));
    }
    if settings.existing == Existing::Refuse && dir.symlink_metadata().is_ok() {
        return Err(user(
            format!("{} exists already", dir.display()),
            format!("{CHOOSE}, or add --overwrite"),
        ));
    }
    writable(&existing_ancestor(&parent(dir)))?;
    Ok(StudentTarget::claim(dir)?)
}

/// The student, on the CPU, with the key exponents that are to be its own.
fn student(settings: &Settings, printer: &Printer) -> anyhow::Result<Model> {
    let found = settings.key_exponents.as_deref().map(key_exponents).transpose()?;
    let mut model = load(&settings.model, &Place::cpu(), printer)?;
    let Some(student) = &model.student else {
        return Err(user(
            format!("{} is not a student", settings.model),
            "linearize it first (still linearize); base models are quantized by the tools of their own format",
        ));
    };
    if let Some(key_exponents) = found {
        let config = StillConfig { key_exponents, ..student.config.clone() };
        model.student = Some(student.with_config(config, model.config())?);
    }
    Ok(model)
}

/// Those of a file of `still calibrate`.
fn key_exponents(path: &Path) -> anyhow::Result<Vec<Vec<KeyExponents>>> {
    let found = Budgets::read(path)?.key_exponents;
    match found.is_empty() {
        false => Ok(found),
        true => Err(user(
            format!("{} has no key exponents: an earlier program wrote it", path.display()),
            "calibrate again: still calibrate --model BASE --data TEXT --out FILE",
        )),
    }
}

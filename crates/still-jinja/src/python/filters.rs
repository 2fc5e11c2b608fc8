//! What stands after `|`: one value to another. Those of text, of numbers and of lists have files of their own.

mod keyed;
mod lists;
mod numbers;
mod text;

use super::args::{CallArgs, integer_or, is_true, required};
use super::json::tojson;
use super::methods::pairs;
use super::sequence::{attribute, item, iterate, length};
use super::text::to_str;
use super::value::Value;
use crate::error::{Error, ErrorKind, Result, type_error};
use crate::meter::Meter;

pub(crate) const FILTERS: &[&str] = &[
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

const NO_ARGUMENTS: [&str; 20] = [
    "abs",
    "capitalize",
    "count",
    "e",
    "escape",
    "first",
    "forceescape",
    "items",
    "last",
    "length",
    "list",
    "lower",
    "reverse",
    "safe",
    "string",
    "striptags",
    "title",
    "upper",
    "urlencode",
    "wordcount",
];

/// Filters that leave marked text marked.
const KEEP_MARKED: [&str; 7] =
    ["upper", "lower", "capitalize", "trim", "string", "center", "indent"];

/// `value | name(…)`.
pub(crate) fn filter(name: &str, value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let filtered = filter_one(name, value, args, meter)?;
    let marks = match value {
        Value::Markup(_) => KEEP_MARKED.contains(&name),
        _ => false,
    };
    if marks { filtered.marked(meter) } else { Ok(filtered) }
}

fn filter_one(name: &str, value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    if NO_ARGUMENTS.contains(&name) && !(args.positional.is_empty() && args.keywords.is_empty()) {
        return Err(type_error(format!("the filter '{name}' takes no arguments")));
    }
    Ok(match name {
        "tojson" => Value::str(tojson(value, args, meter)?),
        "default" | "d" => {
            let [default, boolean] = args.bind(name, ["default_value", "boolean"])?;
            let missing = matches!(value, Value::Undefined(_));
            if missing || (is_true(&boolean) && !value.is_true()) {
                default.unwrap_or_else(|| Value::str(""))
            } else {
                value.clone()
            }
        }
        "length" | "count" => Value::Int(length(value, meter)? as i128),
        "attr" => {
            let [attribute_name] = args.bind(name, ["name"])?;
            let wanted = required(attribute_name, name, "name")?;
            match attribute(value, wanted.as_str().unwrap_or(""), meter)? {
                // Items do not count as attributes.
                found if matches!(value, Value::Dict(_)) && !matches!(found, Value::Method(_)) => {
                    super::sequence::missing(value, &wanted)
                }
                found => found,
            }
        }
        "items" => match value {
            Value::Undefined(_) => Value::iterator(Vec::new(), meter)?,
            value => Value::iterator(pairs(value, meter)?, meter)?,
        },
        "filesizeformat" | "pprint" | "random" | "urlize" | "wordwrap" | "xmlattr" => {
            let what = format!("the filter '{name}' is not supported");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        _ => return text::filter(name, value, args, meter),
    })
}

fn unknown(name: &str) -> Error {
    let name: String = name.chars().take(60).collect();
    type_error(format!("No filter named '{name}'."))
}

//! Filters of lists and dictionaries.

use super::keyed::{Path, dictsort, extreme, groupby, sort, unique};
use super::{
    CallArgs, Meter, Result, Value, integer_or, iterate, required, to_str, type_error, unknown,
};
use crate::python::args::text;
use crate::python::operators::math;
use crate::python::tests::test;

pub(super) fn filter(name: &str, value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    Ok(match name {
        "list" => {
            let list = iterate(value, meter)?;
            Value::List(list)
        }
        "first" => iterate(value, meter)?
            .items
            .first()
            .cloned()
            .unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")),
        "last" => {
            if matches!(value, Value::Iterator(_)) {
                return Err(type_error("'generator' object is not reversible"));
            }
            let last = iterate(value, meter)?.items.last().cloned();
            last.unwrap_or_else(|| Value::undefined("No last item, sequence was empty."))
        }
        "reverse" => match value {
            Value::Str(text) | Value::Markup(text) => {
                meter.bytes(text.len())?;
                Value::str(text.chars().rev().collect::<String>())
            }
            value => {
                let items = iterate(value, meter)?.items.iter().rev().cloned().collect();
                Value::iterator(items, meter)?
            }
        },
        "join" => join(value, args, meter)?,
        "sum" => sum(value, args, meter)?,
        "min" | "max" => extreme(name, value, args, meter)?,
        "sort" => sort(value, args, meter)?,
        "dictsort" => dictsort(value, args, meter)?,
        "unique" => unique(value, args, meter)?,
        "groupby" => groupby(value, args, meter)?,
        "batch" => batch(value, args, meter)?,
        "slice" => slice(value, args, meter)?,
        "map" => map(value, args, meter)?,
        "select" | "reject" | "selectattr" | "rejectattr" => select(name, value, args, meter)?,
        _ => return Err(unknown(name)),
    })
}

/// Texts with a separator between them.
fn join(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [separator, attribute] = args.bind("join", ["d", "attribute"])?;
    let separator = match &separator {
        Some(separator) => to_str(separator, meter)?,
        None => String::new(),
    };
    let path = Path::of(attribute.as_ref())?;
    let mut joined = String::new();
    for (n, item) in iterate(value, meter)?.items.iter().enumerate() {
        meter.bytes(separator.len() + 8)?;
        if n > 0 {
            joined.push_str(&separator);
        }
        crate::python::text::write_str(&path.get(item, None, meter)?, &mut joined, meter)?;
    }
    Ok(Value::str(joined))
}

/// From a start on.
fn sum(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [attribute, start] = args.bind("sum", ["attribute", "start"])?;
    let path = Path::of(attribute.as_ref())?;
    let mut sum = start.unwrap_or(Value::Int(0));
    for item in &iterate(value, meter)?.items {
        let item = path.get(item, None, meter)?;
        sum = math(crate::ast::MathOp::Add, &sum, &item, meter)?;
    }
    Ok(sum)
}

/// Rows of so many items.
fn batch(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [count, fill] = args.bind("batch", ["linecount", "fill_with"])?;
    let count = integer_or(Some(&required(count, "batch", "linecount")?), 1)?;
    let count = usize::try_from(count).ok().filter(|&count| count > 0);
    let count = count.ok_or_else(|| type_error("batch of less than one item"))?;
    let mut rows = Vec::new();
    for chunk in iterate(value, meter)?.items.chunks(count) {
        let mut row = chunk.to_vec();
        if let Some(fill) = fill.clone().filter(|fill| !matches!(fill, Value::None)) {
            meter.elements(count - row.len())?;
            row.resize(count, fill);
        }
        rows.push(Value::list(row, meter)?);
    }
    Value::iterator(rows, meter)
}

/// So many rows of nearly one length.
fn slice(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [slices, fill] = args.bind("slice", ["slices", "fill_with"])?;
    let slices = integer_or(Some(&required(slices, "slice", "slices")?), 1)?;
    let slices = usize::try_from(slices).ok().filter(|&slices| slices > 0);
    let slices = slices.ok_or_else(|| type_error("slice into less than one part"))?;
    meter.elements(slices)?;
    let list = iterate(value, meter)?;
    let (each, more) = (list.items.len() / slices, list.items.len() % slices);
    let mut rows = Vec::new();
    let mut start = 0;
    for n in 0..slices {
        let end = start + each + usize::from(n < more);
        let mut row = list.items[start..end].to_vec();
        if n >= more {
            row.extend(fill.clone().filter(|fill| !matches!(fill, Value::None)));
        }
        rows.push(Value::list(row, meter)?);
        start = end;
    }
    Value::iterator(rows, meter)
}

/// A filter may be given by name to `map`, and `map` itself among them: so many names at most.
const MAX_MAPPED: usize = 16;

fn map(value: &Value, mut args: CallArgs, meter: &Meter) -> Result<Value> {
    if args.positional.len() > MAX_MAPPED {
        return Err(type_error(format!("map takes at most {MAX_MAPPED} arguments")));
    }
    // What is false is not gone through: `None` gives nothing.
    let value = if value.is_true() { value.clone() } else { Value::list(Vec::new(), meter)? };
    let list = iterate(&value, meter)?;
    let mut mapped = Vec::with_capacity(list.items.len().min(1024));
    if args.positional.is_empty() {
        let [attribute, default] = args.bind("map", ["attribute", "default"])?;
        let attribute = attribute.ok_or_else(|| type_error("map requires a filter argument"))?;
        let path = Path::of(Some(&attribute))?;
        let default = default.filter(|default| !matches!(default, Value::None));
        for item in &list.items {
            mapped.push(path.get(item, default.as_ref(), meter)?);
        }
    } else {
        let name = args.positional.remove(0);
        let name = text(&name, "map")?.to_owned();
        for item in &list.items {
            let args =
                CallArgs { positional: args.positional.clone(), keywords: args.keywords.clone() };
            meter.steps(1)?;
            mapped.push(super::filter(&name, item, args, meter)?);
        }
    }
    Value::iterator(mapped, meter)
}

fn select(name: &str, value: &Value, mut args: CallArgs, meter: &Meter) -> Result<Value> {
    let path = if name.ends_with("attr") {
        if args.positional.is_empty() {
            return Err(type_error("Missing parameter for attribute name"));
        }
        Path::of(Some(&args.positional.remove(0)))?
    } else {
        Path::of(None)?
    };
    let by = match args.positional.is_empty() {
        true => None,
        false => Some(text(&args.positional.remove(0), name)?.to_owned()),
    };
    let mut kept = Vec::new();
    if value.is_true() {
        for item in &iterate(value, meter)?.items {
            meter.steps(1)?;
            let found = path.get(item, None, meter)?;
            let holds = match &by {
                None => found.is_true(),
                Some(by) => {
                    let args = CallArgs {
                        positional: args.positional.clone(),
                        keywords: args.keywords.clone(),
                    };
                    test(by, &found, args, meter)?
                }
            };
            if holds == name.starts_with("select") {
                kept.push(item.clone());
            }
        }
    }
    Value::iterator(kept, meter)
}

//! Filters of lists and dictionaries.

use std::cmp::Ordering;

use super::{
    CallArgs, Meter, Result, Value, integer_or, is_true, item, iterate, order, required, to_str,
    type_error, unknown,
};
use crate::error::Error;
use crate::python::args::text;
use crate::python::operators::{math, position};
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
        "join" => {
            let [separator, attribute] = args.bind(name, ["d", "attribute"])?;
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
            Value::str(joined)
        }
        "sum" => {
            let [attribute, start] = args.bind(name, ["attribute", "start"])?;
            let path = Path::of(attribute.as_ref())?;
            let mut sum = start.unwrap_or(Value::Int(0));
            for item in &iterate(value, meter)?.items {
                let item = path.get(item, None, meter)?;
                sum = math(crate::ast::MathOp::Add, &sum, &item, meter)?;
            }
            sum
        }
        "min" | "max" => {
            let [case, attribute] = args.bind(name, ["case_sensitive", "attribute"])?;
            let path = Path::of(attribute.as_ref())?;
            let mut best: Option<(Value, Value)> = None;
            for item in &iterate(value, meter)?.items {
                let key = fold_case(path.get(item, None, meter)?, is_true(&case));
                let wins = match &best {
                    None => true,
                    Some((known, _)) => {
                        let wanted = if name == "min" { Ordering::Less } else { Ordering::Greater };
                        order(&key, known, "<", meter)? == Some(wanted)
                    }
                };
                if wins {
                    best = Some((key, item.clone()));
                }
            }
            let empty = || Value::undefined("No aggregated item, sequence was empty.");
            best.map_or_else(empty, |(_, item)| item)
        }
        "sort" => {
            let [reverse, case, attribute] =
                args.bind(name, ["reverse", "case_sensitive", "attribute"])?;
            let paths = match &attribute {
                Some(Value::Str(text) | Value::Markup(text)) => {
                    text.split(',').map(Path::parse).collect::<Vec<_>>()
                }
                other => vec![Path::of(other.as_ref())?],
            };
            let mut keyed = Vec::new();
            for item in &iterate(value, meter)?.items {
                let keys = paths
                    .iter()
                    .map(|path| Ok(fold_case(path.get(item, None, meter)?, is_true(&case))));
                keyed.push((Value::list(keys.collect::<Result<_>>()?, meter)?, item.clone()));
            }
            sort_keyed(&mut keyed, is_true(&reverse), meter)?;
            Value::list(keyed.into_iter().map(|(_, item)| item).collect(), meter)?
        }
        "dictsort" => {
            let [case, by, reverse] = args.bind(name, ["case_sensitive", "by", "reverse"])?;
            let place = match by.as_ref().map(|by| by.as_str()) {
                None | Some(Some("key")) => 0,
                Some(Some("value")) => 1,
                _ => return Err(type_error("You can only sort by either \"key\" or \"value\"")),
            };
            let mut keyed = Vec::new();
            for pair in super::pairs(value.used()?, meter)? {
                let key = iterate(&pair, meter)?.items[place].clone();
                keyed.push((fold_case(key, is_true(&case)), pair));
            }
            sort_keyed(&mut keyed, is_true(&reverse), meter)?;
            Value::list(keyed.into_iter().map(|(_, pair)| pair).collect(), meter)?
        }
        "unique" => {
            let [case, attribute] = args.bind(name, ["case_sensitive", "attribute"])?;
            let path = Path::of(attribute.as_ref())?;
            let (mut seen, mut kept) = (Vec::new(), Vec::new());
            for item in &iterate(value, meter)?.items {
                let key = fold_case(path.get(item, None, meter)?, is_true(&case));
                if !key.is_hashable() {
                    return Err(type_error(format!("unhashable type: '{}'", key.type_name())));
                }
                if position(&seen, &key, meter)?.is_none() {
                    seen.push(key);
                    kept.push(item.clone());
                }
            }
            Value::iterator(kept, meter)?
        }
        "groupby" => groupby(value, args, meter)?,
        "batch" => {
            let [count, fill] = args.bind(name, ["linecount", "fill_with"])?;
            let count = integer_or(Some(&required(count, name, "linecount")?), 1)?;
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
            Value::iterator(rows, meter)?
        }
        "slice" => {
            let [slices, fill] = args.bind(name, ["slices", "fill_with"])?;
            let slices = integer_or(Some(&required(slices, name, "slices")?), 1)?;
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
            Value::iterator(rows, meter)?
        }
        "map" => map(value, args, meter)?,
        "select" | "reject" | "selectattr" | "rejectattr" => select(name, value, args, meter)?,
        _ => return Err(unknown(name)),
    })
}

/// `"a.b.0"`: where a filter looks in each item.
struct Path(Vec<Value>);

impl Path {
    fn of(attribute: Option<&Value>) -> Result<Self> {
        match attribute {
            None | Some(Value::None) => Ok(Self(Vec::new())),
            Some(Value::Str(text) | Value::Markup(text)) => Ok(Self::parse(text)),
            Some(other) => Ok(Self(vec![other.clone()])),
        }
    }

    fn parse(text: &str) -> Self {
        let part = |part: &str| match part.parse::<u32>() {
            Ok(at) => Value::Int(at.into()),
            Err(_) => Value::str(part),
        };
        Self(text.split('.').map(part).collect())
    }

    fn get(&self, value: &Value, default: Option<&Value>, meter: &Meter) -> Result<Value> {
        let mut value = value.clone();
        for part in &self.0 {
            value = item(&value, part, meter)?;
            if let (Value::Undefined(_), Some(default)) = (&value, default) {
                value = default.clone();
            }
        }
        Ok(value)
    }
}

/// Letters of either case are sorted together unless asked otherwise.
fn fold_case(value: Value, case_sensitive: bool) -> Value {
    match &value {
        Value::Str(text) if !case_sensitive => Value::str(text.to_lowercase()),
        _ => value,
    }
}

/// Stable, by the first of each pair.
fn sort_keyed(keyed: &mut [(Value, Value)], reverse: bool, meter: &Meter) -> Result<()> {
    let mut failed: Option<Error> = None;
    keyed.sort_by(|a, b| {
        if failed.is_some() {
            return Ordering::Equal;
        }
        match order(&a.0, &b.0, "<", meter) {
            Ok(ordering) => {
                let ordering = ordering.unwrap_or(Ordering::Equal);
                if reverse { ordering.reverse() } else { ordering }
            }
            Err(error) => {
                failed = Some(error);
                Ordering::Equal
            }
        }
    });
    failed.map_or(Ok(()), Err)
}

fn groupby(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [attribute, default, case] =
        args.bind("groupby", ["attribute", "default", "case_sensitive"])?;
    let path = Path::of(Some(&required(attribute, "groupby", "attribute")?))?;
    let mut keyed = Vec::new();
    for item in &iterate(value, meter)?.items {
        let key = path.get(item, default.as_ref(), meter)?;
        keyed.push((fold_case(key, is_true(&case)), item.clone()));
    }
    sort_keyed(&mut keyed, false, meter)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (key, item) in keyed {
        match groups.last_mut() {
            Some((known, items)) if known.equals(&key, meter)? => items.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let pair = |(_, items): (Value, Vec<Value>)| {
        let key = path.get(&items[0], default.as_ref(), meter)?;
        Value::tuple(vec![key, Value::list(items, meter)?], meter)
    };
    Value::list(groups.into_iter().map(pair).collect::<Result<_>>()?, meter)
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
        Path(Vec::new())
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

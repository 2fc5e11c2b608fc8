//! Filters that look at a key of each item: the item, or an attribute of it.

use std::cmp::Ordering;

use super::{CallArgs, Meter, Result, Value, is_true, item, iterate, pairs, required, type_error};
use crate::error::Error;
use crate::python::operators::{order, position};

/// `"a.b.0"`: where a filter looks in each item.
pub(super) struct Path(Vec<Value>);

impl Path {
    pub fn of(attribute: Option<&Value>) -> Result<Self> {
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

    pub fn get(&self, value: &Value, default: Option<&Value>, meter: &Meter) -> Result<Value> {
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

/// The least item, or the largest.
pub(super) fn extreme(name: &str, value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
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
    Ok(best.map_or_else(empty, |(_, item)| item))
}

/// By one attribute or several.
pub(super) fn sort(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [reverse, case, attribute] =
        args.bind("sort", ["reverse", "case_sensitive", "attribute"])?;
    let paths = match &attribute {
        Some(Value::Str(text) | Value::Markup(text)) => {
            text.split(',').map(Path::parse).collect::<Vec<_>>()
        }
        other => vec![Path::of(other.as_ref())?],
    };
    let mut keyed = Vec::new();
    for item in &iterate(value, meter)?.items {
        let keys =
            paths.iter().map(|path| Ok(fold_case(path.get(item, None, meter)?, is_true(&case))));
        keyed.push((Value::list(keys.collect::<Result<_>>()?, meter)?, item.clone()));
    }
    sort_keyed(&mut keyed, is_true(&reverse), meter)?;
    Value::list(keyed.into_iter().map(|(_, item)| item).collect(), meter)
}

/// The entries of a mapping, by key or value.
pub(super) fn dictsort(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [case, by, reverse] = args.bind("dictsort", ["case_sensitive", "by", "reverse"])?;
    let place = match by.as_ref().map(|by| by.as_str()) {
        None | Some(Some("key")) => 0,
        Some(Some("value")) => 1,
        _ => return Err(type_error("You can only sort by either \"key\" or \"value\"")),
    };
    let mut keyed = Vec::new();
    for pair in pairs(value.used()?, meter)? {
        let key = iterate(&pair, meter)?.items[place].clone();
        keyed.push((fold_case(key, is_true(&case)), pair));
    }
    sort_keyed(&mut keyed, is_true(&reverse), meter)?;
    Value::list(keyed.into_iter().map(|(_, pair)| pair).collect(), meter)
}

/// The first item of each key.
pub(super) fn unique(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [case, attribute] = args.bind("unique", ["case_sensitive", "attribute"])?;
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
    Value::iterator(kept, meter)
}

/// Items of one key, key by key.
pub(super) fn groupby(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
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

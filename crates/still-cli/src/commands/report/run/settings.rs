//! The recipe's attention settings.

use toml::{Table, Value};

use crate::plot::{Heatmap, about_layers};

/// Salient tokens of a chunk.
#[derive(Debug, PartialEq)]
pub enum Budgets {
    /// `[layer][selection head]`
    PerHead(Vec<Vec<f64>>),
    /// The same everywhere.
    Uniform(i64),
}

impl Budgets {
    /// From a resolved recipe; nothing if it has neither form.
    pub fn of(recipe: &Table) -> Option<Self> {
        let attention = recipe.get("attention")?;
        let heads = |layer: &Value| -> Option<Vec<f64>> {
            layer.as_array()?.iter().map(|budget| Some(budget.as_integer()? as f64)).collect()
        };
        if let Some(layers) = attention.get("budgets").and_then(Value::as_array) {
            return layers.iter().map(heads).collect::<Option<_>>().map(Self::PerHead);
        }
        attention.get("budget")?.as_integer().map(Self::Uniform)
    }

    /// In a few words.
    pub fn words(&self, chunk: Option<i64>) -> String {
        let of = chunk.map_or_else(String::new, |chunk| format!(" of {chunk}"));
        match self {
            Self::Uniform(budget) => format!("{budget}{of} in every head"),
            Self::PerHead(layers) => {
                let all = || layers.iter().flatten().copied();
                let heads = all().count();
                let mean = all().sum::<f64>() / heads.max(1) as f64;
                let full = all().filter(|&budget| Some(budget as i64) == chunk).count();
                format!("{mean:.1}{of} on average; {full} of {heads} heads full")
            }
        }
    }

    /// Layer by head, if heads differ.
    pub fn heatmap(&self, chunk: Option<i64>) -> Option<String> {
        let Self::PerHead(layers) = self else { return None };
        let most = layers.iter().flatten().copied().fold(1.0, f64::max);
        let map = Heatmap {
            title: "Budgets".into(),
            about: about_layers("salient tokens kept of each chunk", layers),
            x: "layer".into(),
            y: "head".into(),
            scale: Heatmap::fitting(layers),
            columns: layers.clone(),
            low: 0.0,
            high: chunk.map_or(most, |chunk| chunk as f64),
        };
        Some(map.html())
    }
}

/// Tokens of a chunk.
pub fn chunk(recipe: &Table) -> Option<i64> {
    recipe.get("attention")?.get("chunk")?.as_integer()
}

/// Every setting of `[attention]` but the budgets per head: its name and its value, as TOML.
pub fn attention(recipe: &Table) -> Vec<(String, String)> {
    let Some(attention) = recipe.get("attention").and_then(Value::as_table) else {
        return Vec::new();
    };
    attention
        .iter()
        .filter(|(name, value)| !(name.as_str() == "budgets" && value.is_array()))
        .map(|(name, value)| {
            (name.clone(), value.as_str().map_or_else(|| value.to_string(), str::to_owned))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        text.parse().unwrap()
    }

    #[test]
    fn budgets_of_every_form() {
        let uniform = table("[attention]\nchunk = 64\nbudget = 4");
        let budgets = Budgets::of(&uniform).unwrap();
        assert_eq!(budgets, Budgets::Uniform(4));
        assert_eq!(budgets.words(chunk(&uniform)), "4 of 64 in every head");
        assert!(budgets.heatmap(Some(64)).is_none());

        let given = table("[attention]\nchunk = 64\nbudget = 4\nbudgets = [[64, 2], [0, 2]]");
        let budgets = Budgets::of(&given).unwrap();
        assert_eq!(budgets, Budgets::PerHead(vec![vec![64.0, 2.0], vec![0.0, 2.0]]));
        assert_eq!(budgets.words(chunk(&given)), "17.0 of 64 on average; 1 of 4 heads full");
        assert!(budgets.heatmap(Some(64)).unwrap().contains("layer 0, head 0: 64"));
        assert!(!budgets.heatmap(Some(64)).unwrap().contains("without cells"));
        let kept = Budgets::of(&table("[attention]\nbudgets = [[], [0, 2]]")).unwrap();
        assert_eq!(kept.words(Some(64)), "1.0 of 64 on average; 0 of 2 heads full");
        let map = kept.heatmap(Some(64)).unwrap();
        assert!(map.contains("layer 1, head 1: 2") && map.contains("without cells"));
        let names: Vec<String> = attention(&given).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["chunk", "budget"]);

        assert_eq!(Budgets::of(&table("seed = 1")), None);
        assert_eq!(Budgets::of(&table("[attention]\nbudgets = [[\"x\"]]")), None);
    }
}

//! The recipes that are part of this crate, by name: those of `recipes/`.

use std::path::Path;

use candle_core::Device;

/// A recipe that can be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuiltIn {
    /// Its file's name, without `.toml`.
    pub name: &'static str,
    /// The file.
    pub text: &'static str,
}

macro_rules! built_in {
    ($($name:literal)*) => {
        [$(BuiltIn { name: $name, text: include_str!(concat!("../../recipes/", $name, ".toml")) }),*]
    };
}

impl BuiltIn {
    /// Every one: this project's own first, then what others published, then baselines.
    pub const ALL: [Self; 13] = built_in! {
        "quick" "still-long" "still-10" "still-7" "uniform" "paper" "still-released" "lolcats" "lola" "linear-only" "streaming-llm" "window-only"
        "random"
    };

    /// The recipe without calibration, whose other values are the defaults.
    pub const UNIFORM: Self = Self::ALL[4];

    /// The recipe of this name.
    pub fn named(name: &Path) -> Option<Self> {
        Self::ALL.into_iter().find(|recipe| Path::new(recipe.name) == name)
    }

    /// The recipe for a machine: minutes on a CPU; what a GPU does in as many minutes, at the lengths that matter.
    pub fn usual(device: &Device) -> Self {
        let name = if device.is_cpu() { "quick" } else { "still-long" };
        Self::named(Path::new(name)).unwrap_or(Self::ALL[0])
    }

    /// Its first comment, up to the end of a sentence.
    pub fn about(self) -> String {
        let lines = self.text.lines().map_while(|line| line.strip_prefix('#'));
        let comment = lines.map(str::trim).collect::<Vec<_>>().join(" ");
        // Not a dot within a number or a name.
        let end = comment.match_indices(". ").map(|(at, _)| at).next();
        comment[..end.unwrap_or(comment.trim_end_matches('.').len())].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_has_a_name() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let files = dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
        let files = files.filter(|path| path.is_file());
        let mut names: Vec<String> =
            files.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
        let mut built_in: Vec<&str> = BuiltIn::ALL.iter().map(|recipe| recipe.name).collect();
        names.sort();
        built_in.sort_unstable();
        assert_eq!(built_in, names);
    }

    #[test]
    fn a_machine_has_a_recipe() {
        assert_eq!(BuiltIn::usual(&Device::Cpu).name, "quick");
        assert!(BuiltIn::named(Path::new("still-long")).is_some());
        assert_eq!(BuiltIn::UNIFORM.name, "uniform");
        assert_eq!(BuiltIn::named(Path::new("quick.toml")), None);
    }

    #[test]
    fn every_recipe_says_what_it_is() {
        for recipe in BuiltIn::ALL {
            let about = recipe.about();
            assert!(about.len() > 20 && !about.contains('#'), "{}: {about}", recipe.name);
        }
    }
}

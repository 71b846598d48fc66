//! The folder for files that can be made again.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The folder for files that a source makes from its data and can make again, such as unpacked archives: `$ETT_CACHE`,
/// else `$XDG_CACHE_HOME/ett`, else `~/.cache/ett`. It need not exist.
pub fn cache_folder() -> Result<PathBuf> {
    chosen(|name| std::env::var_os(name))
}

fn chosen(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    // Relative names in the variables of the XDG specification are invalid and must be ignored.
    let given = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(own) = given("ETT_CACHE") {
        return std::path::absolute(&own).map_err(Error::io(&own));
    }
    let absolute = |name: &str| given(name).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").or_else(|| absolute("USERPROFILE")).map(|home| home.join(".cache")))
        .map(|base| base.join("ett"))
        .ok_or_else(|| {
            let what = "there is no folder for the cache, because HOME is not set; set ETT_CACHE to a folder";
            Error::data(Path::new("ETT_CACHE"), what)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(set: &[(&str, &str)]) -> Result<PathBuf> {
        chosen(|name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into()))
    }

    #[test]
    fn the_first_variable_that_is_set_decides() {
        let all = [("ETT_CACHE", "/fast/ett"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/home/a")];
        let want = ["/fast/ett", "/x/ett", "/home/a/.cache/ett"];
        for (i, want) in want.iter().enumerate() {
            assert_eq!(with(&all[i..]).unwrap(), Path::new(want));
        }
        let odd = [("ETT_CACHE", ""), ("XDG_CACHE_HOME", "relative"), ("HOME", "/home/a")];
        assert_eq!(with(&odd).unwrap(), Path::new("/home/a/.cache/ett"));
        assert!(with(&[]).unwrap_err().to_string().contains("set ETT_CACHE to a folder"));
        assert!(with(&[("ETT_CACHE", "here")]).unwrap().is_absolute());
    }
}

//! Where the remote tier is.

use std::path::PathBuf;

/// A checked `--remote-url`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RemoteUrl {
    /// A folder, mounted from somewhere.
    Folder(PathBuf),
    /// A bucket that speaks S3.
    S3 {
        /// Its name.
        bucket: String,
        /// Before the names of all objects; may be empty.
        prefix: String,
    },
}

/// Not a place that is known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "--remote-url {url:?} is no place that is known: give file:///FOLDER or s3://BUCKET/PREFIX"
)]
pub struct UrlError {
    url: String,
}

impl std::str::FromStr for RemoteUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        match url.split_once("://") {
            Some(("file", folder)) if folder.starts_with('/') => Ok(Self::Folder(folder.into())),
            Some(("s3", place)) => {
                let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
                let (bucket, prefix) = (bucket.to_owned(), prefix.trim_end_matches('/').to_owned());
                let is_named = !bucket.is_empty() && !prefix.split('/').skip(1).any(str::is_empty);
                is_named
                    .then_some(Self::S3 { bucket, prefix })
                    .ok_or_else(|| UrlError { url: url.to_owned() })
            }
            _ => Err(UrlError { url: url.to_owned() }),
        }
    }
}

impl std::fmt::Display for RemoteUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Folder(folder) => write!(f, "file://{}", folder.display()),
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_read_back_and_others_are_refused() {
        for url in ["file:///a/b", "s3://bucket", "s3://bucket/a/b"] {
            assert_eq!(url.parse::<RemoteUrl>().unwrap().to_string(), url);
        }
        assert_eq!("s3://bucket/a/".parse::<RemoteUrl>().unwrap().to_string(), "s3://bucket/a");
        for url in ["", "a", "file://a", "s3://", "s3:///a", "s3://b/a//c", "ftp://a"] {
            assert!(url.parse::<RemoteUrl>().is_err(), "{url}");
        }
    }
}

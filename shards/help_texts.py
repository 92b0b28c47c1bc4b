"""What the help of the `shards` command says."""

EXAMPLES = """examples:
  shards phantom data/phantom --subjects 200 --seed 0
  shards pack data/phantom data/packed --config demo
  shards preprocess bids/ derivative/ --spacing 2
  shards pack my_scans.csv packed --spacing 1 --shape 160 192 160 --max-rejects 5% --group family
  shards split packed --folds 5 --seed 0
  shards verify packed
  shards inspect packed --json
"""
PREPROCESS = """SOURCE is a BIDS folder (sessions too) or a CSV with the columns participant_id and path (session_id is
optional), with T1-weighted scans as NIfTI (.nii, .nii.gz, .hdr with .img) or FreeSurfer's .mgz. OUT becomes a BIDS
derivative, which `shards pack` takes as its source. Steps, in this order:

  brain         extract the brain: deepbet, except where the scan is extracted already (--brain auto)
  bias          correct the scanner's intensity inhomogeneity (N4)
  registration  register to a template (affine or rigid); follow-ups to the subject's first registered session
  tissue        probabilities of grey matter, white matter and cerebrospinal fluid

The same command again processes only what has changed: a scan is skipped where its file and the recipe are the same.
Scans that cannot be processed are listed with their reasons in OUT/rejected.tsv. With --brain mask, the mask of each
scan is the file *_mask.nii.gz beside it, or stands in the column mask of the CSV.

Options that are not given come from the preset: configs/preprocess/NAME.yaml, over configs/preprocess/default.yaml.

examples:
  shards preprocess bids/ derivative/ --spacing 2
  shards preprocess fmriprep/ derivative/ --entities desc=preproc --brain mask    in fMRIPrep's own masks
  shards preprocess scans.csv derivative/ --registration rigid --steps brain bias registration
  shards preprocess bids/ derivative/ --brain hd-bet --weights release_2.0.0.zip --weights-sha256 HASH
"""
PACK = """SOURCE is a BIDS folder (participants.tsv, sub-X[/ses-Y]/anat/*_SUFFIX.nii.gz) or a CSV with the columns
participant_id and path (absolute, or in the folder of the CSV; session_id is optional; with several volume
variables, one column per variable, with its name), or a derivative of `shards preprocess`, whose volumes stay where
the template has them and whose tissue maps are packed too. Each volume is resampled to RAS, the spacing and the
shape, centred on the brain, with intensities in [0, 1]. A scan that is no brain-extracted T1w brain (a head with
skull, a CT, a label map, a slab) is rejected, or with --keep-suspect packed and flagged. Rejected rows are listed
with their reasons in OUT/rejected.tsv. After an interruption, the same command resumes after the complete shards. For
a finished data set, it converts the rows that are new or whose files have changed, and no others.

Options that are not given come from the preset: configs/pack/NAME.yaml, over configs/pack/default.yaml.

examples:
  shards pack bids/ packed
  shards pack bids/ packed --split 0 0 1          a data set for testing only
  shards pack bids/ packed --rename gender=sex    the table's column `gender` is the schema's `sex`
  shards pack bids/ packed --entities space=MNI152NLin2009cAsym,desc=preproc    of several files of a scan, this one
  shards pack bids/ packed --split-column set     column `set` holds train, validation (val, dev) or test
  shards pack scans.csv packed --config h200 --format webdataset --schema my_schema.yaml --workers 8
  shards pack bids/ packed --part 1/4             on one of four machines; then, on any of them, shards merge packed
"""
MERGE = """The parts have to be complete, and of equal arguments; no scan is converted. `shards pack` without --part
makes a data set of them too, and converts what is missing.

examples:
  shards pack bids/ packed --part 1/2
  shards pack bids/ packed --part 2/2
  shards merge packed
"""
SPLIT = """A recorded split never changes; another split needs another NAME. A data set that was packed with --group
keeps each group in one part here too.

examples:
  shards split packed --folds 5 --seed 0          fold-1-of-5 ... fold-5-of-5
  shards split packed --fractions 0.8 0.05 0.15 --name wide-test
"""
AUDIT = """The page is one file that loads nothing: pictures of every volume, sorted by how unusual it is, likely
duplicates, the correlation of intensities with the scalars, and their distributions by split and category. Verdicts
are downloaded from it as verdicts.tsv, and `shards pack --exclude verdicts.tsv` leaves the rejected records out.

examples:
  shards audit packed --out audit.html
  shards pack bids/ packed-2 --exclude verdicts.tsv
"""
VERIFY = """Every byte is read once, on all cores. A line for each damage names the file, the record with its variable,
and the byte where it begins. With --repair the damaged volumes are converted from SOURCE again, as they were when OUT
was packed; a file is replaced where all of it has its recorded SHA-256. A damaged index is restored from its copy.
Files that do not belong to OUT are noted, and stay.

examples:
  shards verify packed
  shards verify packed --repair --source bids/
"""

RENAME = "columns of the table under the schema's names, as gender=sex"
FILES_ROOT = (
    "all files of a CSV must lie in this folder, where its relative paths begin; without it relative paths stay in the "
    "folder of the CSV, and absolute ones may lead anywhere"
)
ENTITIES = "of the volumes' names in a BIDS folder, as space=MNI152NLin2009cAsym,desc=preproc"

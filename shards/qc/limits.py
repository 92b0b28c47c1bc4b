"""Limits of the figures of :mod:`shards.qc.figures` and :mod:`shards.qc.registered`, and the verdict on a scan.

Limits follow from what a brain is, or from the physics of the image; the measured ranges beside them are of 216
brain-extracted T1w scans of three scanners (IXI, OASIS-1, ds002748), and of 9 whole heads of IXI.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

T1W = "T1w"
NAMED = 2  # reasons of one verdict; more say the same
REMEDY = "run `shards preprocess`, which extracts brains, first"
FAILED = "so it is after brain extraction: look at the scan, whether it is one whole head or brain, upright"


@dataclass(frozen=True)
class Limit:
    """The range in which a figure of a usable scan lies.

    Attributes:
        figure: its name.
        low, high: bounds, inclusive.
        step: steps of the verdict: a scan that fails one is not looked at further, because what comes later follows
            from it. ``image``: what kind of image it is; ``head``: whether the brain is extracted; ``brain``: whether
            it is a whole brain, upright; ``registered``: how it fits the template.
        reason: what a figure outside of the range means; ``{}`` is the figure.
        basis: where the bounds come from.
        heads: whether the limit holds for a head before brain extraction too.
        t1w: whether it holds for T1-weighted scans alone.
        rejects: whether a scan outside is rejected; otherwise it is flagged.
    """

    figure: str
    low: float
    high: float
    step: str
    reason: str
    basis: str
    heads: bool = False
    t1w: bool = False
    rejects: bool = True


INF = math.inf
OUTLIERS = "beyond five times the range of most tissue lies none; 0 measured"
LIMITS = (
    Limit("hounsfield", 0, 0.05, "image", "a CT, not MR: its background is air in Hounsfield units (-1000)",
          "a head in a CT has at least 20 % of air; magnitudes of MR are not negative", heads=True),
    Limit("flat", 0, 0.6, "image", "a label map or mask, not a scan: {:.0%} of neighbouring voxels are exactly equal",
          "noise of a scan differs between neighbours; 0.00 to 0.17 for scans of 8 to 16 bits, label maps 0.85 or more",
          heads=True),
    Limit("negative", 0, 0.1, "image", "{:.0%} of the voxels are negative: a statistical map or z-scores, not a scan",
          "magnitudes are not negative; interpolation leaves a few per cent beside edges; 0 measured, a statistical "
          "map 0.66", heads=True),
    Limit("voxel_mm", 0, 12.5, "image", "voxels of {:.3g} mm are too coarse to show a brain",
          "12 mm are the coarsest phantoms; the white matter under a gyrus is 10 mm wide", heads=True),
    Limit("unoriented", 0, 0.5, "image", "the header does not say how the scan lies (the codes of sform and qform are "
          "0): left and right may be exchanged", "NIfTI: code 0 means unknown coordinates", heads=True, rejects=False),
    Limit("header_sizes", 0, 0.02, "image", "pixdim differs from the sform's voxel sizes by {:.0%}; the sform is used",
          "rounding and calibration stay below; 0.000 measured", heads=True, rejects=False),
    Limit("shear_degrees", 0, 10, "image", "sheared: axes of the affine are {:.0f} degrees off right angles; correct "
          "it, or resample the scan", "axes of a scanner are at right angles; 0.00 measured", heads=True),
    Limit("shear_degrees", 0, 2, "image", "sheared: axes of the affine are {:.0f} degrees off right angles",
          "rounding stays below; 0.00 measured", heads=True, rejects=False),
    Limit("header_degrees", 0, 20, "image", "qform and sform are turned against each other by {:.0f} degrees; the "
          "sform is used", "heads in a scanner are tilted by 20 degrees at most", heads=True, rejects=False),
    Limit("height_mm", 70, INF, "image", "only {:.0f} mm from bottom to top: a slab, or a part of a brain",
          "brains of 500 ml are about 90 mm high; 120 to 156 mm measured", heads=True),
    Limit("length_mm", 90, INF, "image", "only {:.0f} mm from back to front: a slab, or a part of a brain",
          "brains of 500 ml are about 120 mm long; 144 to 192 mm measured", heads=True),
    Limit("width_mm", 75, INF, "image", "only {:.0f} mm from left to right: a slab, or a part of a brain",
          "brains of 500 ml are about 95 mm wide; 123 to 152 mm measured", heads=True),
    Limit("compact", 0.3, 1, "image", "no brain: the signal fills {:.0%} of its bounding box (vessels, bone, a CT or "
          "an angiogram)", "ellipsoids fill 0.52; brains 0.40 to 0.48, heads 0.47 to 0.55, vessels 0.03", heads=True),
    Limit("blur", 0, 3.1, "image", "too blurred for MR: edges are {:.1f} voxels wide (a PET or SPECT image, or strong "
          "smoothing)", "a sharp edge is 1 to 2.5 blocks wide; 1.97 to 2.54 measured, a PET template 3.6", heads=True),
    Limit("gap", 0, 0.25, "head", "a head with skull and scalp: {:.0%} of the rays from its surface cross a dark layer "
          "under a bright one", "bone gives no signal; brains 0.00 to 0.07 (sulci; phantoms at most 0.16), "
          "heads 0.34 to 0.70"),
    Limit("signal_outside", 0, 0.05, "head", "not brain-extracted: {:.0%} of the space around the brain or head holds "
          "signal or noise", "brain extraction leaves an empty background; at most 0.0002 measured, heads 0.08 "
          "or more"),
    Limit("volume_ml", 0, 2400, "head", "{:.0f} ml are too many for a brain: a head with skull and scalp, or a wrong "
          "voxel size", "the largest healthy intracranial volumes are 2,100 ml; 1,097 to 1,882 ml measured, at most "
          "2,195 ml after affine registration to MNI152, heads 3,251 ml or more"),
    Limit("empty_faces", 0.95, 1, "head", "{:.0%} of the image's border is empty: not brain-extracted (the neck leaves "
          "the image), or the brain is cut", "an extracted brain touches the border with its stem at most; "
          "1.00 measured, heads 0.85 to 0.92"),
    Limit("cut", 0, 0.25, "head", "cut by the border of the image in {:.0%} of its cross-section: the neck of a head "
          "that is not brain-extracted, or a brain that is not covered",
          "the brain stem has 0.08 of the largest section; 0.00 measured, at most 0.16 in a template's box, necks "
          "0.36 to 0.65"),
    Limit("outliers", 0, 0.02, "brain", "{:.1%} of the voxels are far brighter or darker than tissue: overflows, or a "
          "damaged file", OUTLIERS),
    Limit("outliers", 0, 0.001, "brain", "{:.1%} of the voxels are far brighter or darker than tissue (overflows, "
          "spikes); they are clipped", OUTLIERS, rejects=False),
    Limit("peak", 0, 2.5, "brain", "the strongest voxels are {:.1f} times as strong as white matter: they take most of "
          "the range, and tissue has little contrast", "1.15 to 1.54 measured", t1w=True, rejects=False),
    Limit("solid", 0.7, 1, "brain", "hollow: {:.0%} of the outline is tissue; a CT, or a skull without brain",
          "ventricles are at most 10 % of a brain, even in hydrocephalus hardly 25 %; 0.97 to 1.00 measured"),
    Limit("volume_ml", 500, INF, "brain", "{:.0f} ml are too few for a human brain: a part of one, an animal, or a "
          "wrong voxel size", "brains of one-year-olds have 700 ml or more; 1,097 to 1,882 ml measured", heads=True),
    Limit("likeness", 0.75, 1, "brain", "not shaped like a brain: correlation {:.2f} with an average outline",
          "spheres and ellipsoids have 0.88 to 0.91; 0.93 to 0.97 measured"),
    Limit("upright", -0.015, INF, "brain", "stored upside down, back to front or with axes exchanged, or cut: another "
          "orientation fits a brain better (by {:.3f}); correct the affine",
          "0.006 to 0.060 measured; of 301 copies with reversed or exchanged axes all are at most -0.019, of 172 "
          "copies turned by 20 degrees all but two at least -0.004"),
    Limit("fluid", 0, 1.3, "brain", "not T1-weighted: fluid and cortex are brighter than white matter (T2 or PET; "
          "{:.1f}, T1w lies below 1)", "T1: white > grey > CSF; 0.32 to 0.70 measured, a T2 template 3.1, phantoms of "
          "T2 1.37 or more", t1w=True),
    Limit("rim", 0, 1.1, "brain", "not T1-weighted: the cortex is {:.2f} times as bright as white matter",
          "T1: grey is 0.6 to 0.9 of white; 0.59 to 0.86 measured, a constant object 1.0", t1w=True),
    Limit("blur_inside", 0, 5.0, "brain", "no cortex to be seen: edges inside of the brain are {:.1f} voxels wide",
          "2.1 to 4.2 measured, an extracted PET template 6.0", rejects=False),
    Limit("box", 0, 0.5, "brain", "reaches {:.0f} of the six sides of the packed box: what lies beyond is lost",
          "a brain with all layers inside the box is whole", rejects=False),
    Limit("affine_covered", 0.85, 1, "registered", "{:.0%} of the template's brain is covered: a part of a brain, or "
          "a failed registration", "0.97 to 1.00 measured with MNI152"),
    Limit("affine_overlap", 0.85, 1, "registered", "the brain's outline overlaps that of the template by {:.2f} (Dice):"
          " failed brain extraction or registration", "0.91 to 0.97 measured; half brains, whole heads 0.71 to 0.81"),
    Limit("affine_similarity", 0.25, 1, "registered", "looks unlike the template (correlation {:.2f}): not "
          "T1-weighted, upside down, or a failed registration", "0.39 to 0.63 measured, phantoms 0.28 up; reversed "
          "brains 0.17 to 0.22, T2, PET and labels below 0", t1w=True),
    Limit("rigid_covered", 0.5, 1, "registered", "{:.0%} of the template's brain is covered: a part of a brain, or a "
          "failed registration", "head size stays; 0.62 to 0.92 measured with MNI152, which is large"),
    Limit("rigid_overlap", 0.65, 1, "registered", "the brain's outline overlaps that of the template by {:.2f} (Dice): "
          "failed brain extraction or registration", "head size stays; 0.77 to 0.93 measured"),
    Limit("rigid_similarity", 0.05, 1, "registered", "looks unlike the template (correlation {:.2f}): not T1-weighted, "
          "or a failed registration", "0.11 to 0.47 measured; T2, PET and labels below 0", t1w=True),
)  # fmt: skip


def verdict(
    figures: Mapping[str, float], contrast: str = T1W, head: bool = False, extracted: bool = False
) -> list[str]:
    """The reasons for which a scan should be rejected; empty for one that is fit to use.

    Args:
        figures: of :func:`shards.qc.figures.measure` or :func:`shards.qc.registered.compare`; limits of figures that it
            lacks are not applied.
        contrast: BIDS suffix of the scan; limits of T1-weighted intensities apply to ``T1w`` alone.
        head: the scan may be a head before brain extraction.
        extracted: it comes from brain extraction, so that this is no remedy.
    """
    failed = violated(figures, contrast, head)
    reasons = [limit.reason.format(figures[limit.figure]) for limit in failed[:NAMED]]
    return [*reasons, FAILED if extracted else REMEDY] if failed and failed[0].step == "head" else reasons


def violated(
    figures: Mapping[str, float], contrast: str = T1W, head: bool = False, rejects: bool = True
) -> list[Limit]:
    """The limits that a scan violates, of the first step of the verdict in which it does.

    Args:
        figures, contrast, head: see :func:`verdict`.
        rejects: limits that reject; otherwise those that flag.
    """
    found = [
        limit
        for limit in LIMITS
        if limit.rejects == rejects
        and (limit.heads or limit.step == "registered" or not head)
        and (contrast == T1W or not limit.t1w)
        and not limit.low <= figures.get(limit.figure, limit.low) <= limit.high
    ]
    return [limit for limit in found if limit.step == found[0].step]


def explain(flag: str, figures: Mapping[str, float]) -> str:
    """What a flag of a record means, in words.

    Args:
        flag: ``VARIABLE.FIGURE``, or ``VARIABLE.preprocess.FIGURE`` or ``VARIABLE.preprocess.brain.FIGURE`` of a
            preprocessed volume; see :class:`shards.index.Record`.
        figures: of the record.
    """
    variable, figure = flag.split(".")[0], flag.split(".")[-1]
    value = figures[flag]
    limits = [limit for limit in LIMITS if limit.figure == figure]
    limit = next((limit for limit in limits if not limit.low <= value <= limit.high), limits[0])
    return f"{variable}: {limit.reason.format(value)}"

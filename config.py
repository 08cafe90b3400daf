"""Every setting of WEDGE-Net. Edit here, or override one for a single run: ``python train.py --category wood``.

The same names in lower case with hyphens are the flags; ``--help`` of any script lists them with their meaning.
"""

# Data: which pictures, and how they are brought to the network's size.
DATA_PATH = "./mvtec_ad"  # holds category/train/good, category/test/<defect>, category/ground_truth/<defect>
CATEGORY = "tile"  # one category, a comma list ("tile, wood") or "all"
IMAGE_SIZE = 224  # pixels of what the network sees: a number (square), or (height, width) for long parts
CENTER_CROP = True  # the shorter side becomes RESIZE and the centre is cut out; False: the whole picture is looked at
RESIZE = 256  # pixels, used with CENTER_CROP only
REGION = None  # a picture, white where the part is looked at; None = the category's region.png if it has one
BIT_DEPTH = None  # of files with 16 bits a channel: 8, 10, 12, 14 or 16 are used; None = found from the training images

# Method: what is remembered of good parts, and from when on a part is called defective.
# resnet18, resnet34, resnet50, resnet101, wide_resnet50_2, resnext50_32x4d, efficientnet_lite0, efficientnet_lite1,
# efficientnet_lite2, or any convolutional network of timm with maps at stride 8 and 16: "timm:regnety_016"
BACKBONE = "resnet50"
BACKBONE_WEIGHTS = None  # None = ImageNet weights; a state-dict file for machines without internet; "random" = dry run
FORM = "wedge"  # "wedge" (ours: a memory at two scales, a lens for each condition) or "paper" (the paper's)
# Of "wedge": what pictures may be in. Noise in grey levels, blur in pixels (both sigma), colour as factor of contrast.
CONDITIONS = "clean, noise5, noise10, noise20, noise30, noise40, blur1, blur2, colour0.5, colour1"
WAVELET_TYPE = "haar"  # of the frequency stream: any discrete wavelet of PyWavelets, "haar", "bior2.2", "db2", ...
USE_SEMANTIC = False  # the semantic attention stream; in form "wedge" it costs accuracy on real photographs
SAMPLING_RATIO = 0.1  # share of the training patches that is kept: above 0 to 1, a comma list, or "all" (1, 0.1, 0.01)
SAMPLING_METHOD = "coreset"  # "coreset" (greedy k-centre) or "random"
SEED = 42  # of everything random: coreset start, random sampling, frequency gate
FALSE_ALARM_RATE = 0.01  # share of good parts that may be called defective; sets the threshold, from good parts alone

# Results: the folders that memory banks, tables and figures go to, and the PatchCore baseline beside them.
SAVE_DIR = "WEDGE-Net"
SemanticOFF_DIR = "WEDGE-Net"  # banks trained with USE_SEMANTIC = False
SemanticON_DIR = "WEDGE-Net_Sem_ON"  # banks trained with USE_SEMANTIC = True
PatchCore_DIR = "patch_core_pt"  # the baseline's banks
PATCHCORE_BACKBONE = "wide_resnet50_2"  # any of BACKBONE's; a bank of train_patchcore.py knows its own
PATCHCORE_WEIGHTS = None  # as BACKBONE_WEIGHTS

# Machine: what computes, and how much at a time. But for rounding, only SHARD_IMAGES and PRECISION change results.
DEVICE = "auto"  # "auto" (CUDA, then MPS, then CPU), "cpu", "cuda", "cuda:1", "mps"
ENGINE = "auto"  # what scores images: "auto" (onnxruntime on a CPU, torch elsewhere), "torch", "onnxruntime"
PRECISION = "float32"  # of the network on an NVIDIA GPU: "float32", or faster "tf32", "bfloat16", "float16"
BATCH_SIZE = 32  # images
NUM_WORKERS = "auto"  # threads that decode images: "auto" or a number, 0 = none
# None, "local:4" (processes here), "tcp://host:8786" or a scheduler's .json file: Dask workers that do the categories.
SCHEDULER = None
SHARD_IMAGES = None  # training images held in memory at a time; None = all of a category

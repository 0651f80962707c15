#include "families.h"

namespace normzoo {
NORMZOO_FAMILIES(, c10::Half)
}

#include "families.h"

namespace normzoo {
NORMZOO_FAMILIES(, float)
}

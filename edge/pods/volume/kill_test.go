package volume

const killDir = "FAIRLEAD_KILL"

func killed(string) {}

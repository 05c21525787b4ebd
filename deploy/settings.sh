#!/usr/bin/env bash
# Print the settings of a stack as TOML, for `python -m fruits_dask run --config`.
#
#   deploy/settings.sh STACK TAG [AWS CLI options, such as --region eu-west-1 --profile me] > fruits.toml
#
# It only reads. Needs the AWS CLI, version 2.
set -euo pipefail

if (($# < 2)) || [[ $1 == -* || $2 == -* ]]; then
  echo "usage: ${0##*/} STACK TAG [AWS CLI options]" >&2
  exit 2
fi
stack=$1
tag=$2
shift 2

outputs=$(aws cloudformation describe-stacks --stack-name "$stack" \
  --query 'Stacks[0].Outputs[].[OutputKey, OutputValue]' --output text "$@")

value_of() {
  local key value
  while IFS=$'\t' read -r key value; do
    if [[ $key == "$1" ]]; then
      printf '%s' "$value"
      return
    fi
  done <<<"$outputs"
  echo "the stack $stack has no output $1; is it of deploy/stack.yaml, and complete?" >&2
  return 1
}

# Assigned one by one, because `set -e` does not see a failure inside a here document.
region=$(value_of Region)
subnet=$(value_of SubnetId)
group=$(value_of SecurityGroupId)
profile=$(value_of InstanceProfile)
repository=$(value_of Repository)
input=$(value_of Input)
output=$(value_of Output)

ami=/fruits-dask/ami
if ! aws ssm get-parameter --name "$ami" --query Parameter.Value --output text "$@" >/dev/null; then
  ami=/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id
  echo "no AMI of your own (deploy/ami.pkr.hcl): plain Ubuntu, which needs the stack with Egress=nat" >&2
fi

cat <<END
# Of the stack $stack, by deploy/settings.sh.
input = "$input"
output = "$output"

[cluster]
kind = "ec2"
region = "$region"
subnet_id = "$subnet"
security_groups = ["$group"]
iam_instance_profile = "$profile"
docker_image = "$repository:$tag"
ami = "$ami"
use_private_ip = true
END
